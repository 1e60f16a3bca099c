"""What the command line's commands do, by theme; `equipoise.cli` has the one table of them."""
