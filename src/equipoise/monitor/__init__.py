"""Watch the routers of a model: exact statistics, detectors, alerts, a store, and views of them.

Import from the files; nothing happens here.
"""
