"""Prometheus: an exporter of routing statistics, alert rules, a dashboard. Import from the files.

Needs the extra `prometheus` where it serves; the rules and the dashboard are text and need nothing.
"""
