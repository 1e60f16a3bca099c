"""Debian's Alertmanager, started by a test: fetched into a cache, not installed (tests/monitor/debian.py)."""

import queue
import re
import subprocess
import threading
from contextlib import contextmanager

from tests.monitor.debian import binary, relocated
from tests.monitor.sinks.cases import PATIENCE_S

PACKAGE = "prometheus-alertmanager"
TEMPLATES = "/usr/share/prometheus/alertmanager"
CONFIG = """
route:
  receiver: test
  group_by: [alertname, layer, run]
  group_wait: 10ms
  group_interval: 50ms
  repeat_interval: 1h
receivers:
  - name: test
    webhook_configs:
      - url: {url}/from-alertmanager
        send_resolved: true
"""


@contextmanager
def running_alertmanager(folder, receiver):
    """(its URL, the path of its configuration). What comes out of it goes to the receiver, at /from-alertmanager."""
    program = relocated(PACKAGE, "usr/bin/prometheus-alertmanager", folder=TEMPLATES)
    templates = binary(PACKAGE, f"{TEMPLATES[1:]}/default.tmpl").parent
    config = folder / "alertmanager.yml"
    config.write_text(CONFIG.format(url=receiver.url))
    command = [program, f"--config.file={config}", f"--storage.path={folder / 'data'}"]
    command += ["--cluster.listen-address=", "--web.listen-address=127.0.0.1:0", "--web.external-url=http://am.example"]
    out, err = subprocess.DEVNULL, subprocess.PIPE
    process = subprocess.Popen(command, cwd=templates, stdout=out, stderr=err, text=True)
    said = queue.Queue()
    reader = threading.Thread(target=lambda: [said.put(line) for line in process.stderr] + [said.put("")], daemon=True)
    reader.start()
    try:
        port = None
        while port is None:  # it says which port it was given
            line = said.get(timeout=PATIENCE_S)
            assert line, f"Alertmanager ended with code {process.wait()}"
            match = re.search(r'address="?127\.0\.0\.1:(\d+)', line)
            port = match and match[1]
        yield f"http://127.0.0.1:{port}", config
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        reader.join(PATIENCE_S)
        process.stderr.close()
