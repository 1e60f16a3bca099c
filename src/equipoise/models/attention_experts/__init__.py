"""Attention whose heads, or projections, are experts: three alternatives to `Attention`, chosen by configuration."""
