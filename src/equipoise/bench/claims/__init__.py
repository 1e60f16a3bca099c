"""A registry of published claims about routing, each measured here, with a control in which its effect is absent."""
