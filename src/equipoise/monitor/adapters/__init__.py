"""Adapters: make layers that equipoise did not build look like its own to the recorder, and tie it to their loops.

Import from the files; nothing happens here.
"""
