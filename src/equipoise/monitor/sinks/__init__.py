"""Where the monitor's windows, alerts and repairs go: pagers, chats, files, dashboards of others.

Import from the files; nothing happens here.
"""
