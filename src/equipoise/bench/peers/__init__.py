"""What others use, each an optional import: one file per package, one line each in `equipoise.bench.variants`."""
