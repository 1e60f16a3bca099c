"""From an alert to a repair: a pure policy that proposes, and actions that are applied one at a time."""
