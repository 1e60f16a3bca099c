"""Web pages that read run folders: health, load of every expert over time, incidents, comparisons.

`serve` needs the extra `dashboard`. Nothing of NiceGUI is imported before it is called. It trains and repairs nothing.
"""

from equipoise.dashboard.server import serve

__all__ = ["serve"]
