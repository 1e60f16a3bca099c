"""The server as a process: pages, token, binding, hostile names, files that cannot be read."""

from __future__ import annotations

import re
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from tests.dashboard.conftest import Served, serving
from tests.dashboard.stores import write_run

from equipoise.commands.dashboard import dashboard
from equipoise.dashboard.runs import run_ref
from equipoise.dashboard.server import serve

HOSTILE = "<script>window.pwned=1</script>"
BREAKOUT = "`${window.pwned=1}`</script><img src=x onerror=window.pwned=1>"
TOKEN = "a-long-enough-token"

pytestmark = pytest.mark.usefixtures("nicegui")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three good runs, one of them with hostile names, and two that cannot be read."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "good", incident=True)
    write_run(folder / "other")
    write_run(folder / "<img src=x onerror=window.pwned=1>", layers=[HOSTILE, BREAKOUT], name=HOSTILE, incident=True)
    for name in ("corrupt", "foreign"):
        (folder / name).mkdir()
    (folder / "corrupt" / "run.sqlite").write_bytes(b"certainly not SQLite" * 100)
    db = sqlite3.connect(folder / "foreign" / "run.sqlite")
    db.execute("CREATE TABLE bookmarks (url TEXT)")
    db.close()
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    pytest.importorskip("nicegui", reason="needs the extra: pip install 'equipoise[dashboard]'")
    with serving(tmp_path_factory.mktemp("server"), folder) as served:
        yield served
    assert "Traceback" not in served.log.read_text()


@pytest.fixture(scope="module")
def guarded(folder, tmp_path_factory):
    pytest.importorskip("nicegui", reason="needs the extra: pip install 'equipoise[dashboard]'")
    with serving(tmp_path_factory.mktemp("guarded"), folder, token=TOKEN) as served:
        yield served


class TestPages:
    def test_every_page_answers(self, server, folder):
        good = run_ref(folder / "good").id
        other = run_ref(folder / "other").id
        since = "/incident?key=layers.1.mlp%3Acollapse&since=60"
        for path, text in {
            "/": "Runs",
            f"/run/{good}": "Load of the experts",
            f"/run/{good}?layer=layers.0.mlp&step=40": "step 40 of 120",
            f"/run/{good}{since}": "Collapse in layers.1.mlp, expert 5",
            f"/run/{good}/incident?key=x&since=1": "There is no alert x since step 1",
            f"/compare?a={good}&b={other}": "Compare two runs",
            "/compare?a=unknown": "Compare two runs",
            "/run/unknown": "There is no such run here",
        }.items():
            answer = server.get(path)
            assert answer.status == 200, path
            assert text in answer.text, path

    def test_a_page_names_no_other_host(self, server, folder):
        text = server.get(f"/run/{run_ref(folder / 'good').id}").text
        assert "https://" not in text
        assert [line for line in text.split('"') if line.startswith("http://") and "w3.org" not in line] == []

    def test_co_selection_says_that_it_is_not_recorded(self, server, folder):
        assert "Not recorded." in server.get(f"/run/{run_ref(folder / 'good').id}").text

    def test_nonsense_is_answered(self, server, folder):
        good = run_ref(folder / "good").id
        assert server.get(f"/run/{good}?step=soon").status == 422
        assert server.get(f"/run/{good}?layer=unknown&step=-5").status == 200
        assert server.get("/nowhere").status == 404
        assert server.get("/_equipoise/static/../server.py").status == 404


class TestHostileNames:
    def test_they_are_nowhere_markup(self, server, folder):
        run = run_ref(folder / "<img src=x onerror=window.pwned=1>").id
        for path in ("/", f"/run/{run}", "/compare", f"/run/{run}/incident?key={'%3Cscript%3Ealert(1)%3C/script%3E'}"):
            text = server.get(path).text
            assert "<script>window.pwned" not in text
            assert "<script>alert(1)" not in text
            assert "<img src=x" not in text
            assert "${window.pwned" not in text

    def test_but_they_are_shown(self, server):
        assert "&lt;script&gt;window.pwned=1" in server.get("/").text


class TestUnreadable:
    def test_they_have_cards_and_the_others_are_usable(self, server, folder):
        text = server.get("/").text
        assert "file is not a database; this is no run store, or it is damaged" in text
        assert "an SQLite file of something else" in text
        assert "good" in text
        assert "This run cannot be read" in server.get(f"/run/{run_ref(folder / 'corrupt').id}").text
        assert "120 of 120" in server.get(f"/run/{run_ref(folder / 'good').id}").text

    def test_a_locked_file(self, tmp_path):
        write_run(tmp_path / "runs" / "locked")
        write_run(tmp_path / "runs" / "free")
        holder = sqlite3.connect(tmp_path / "runs" / "locked" / "run.sqlite", isolation_level=None)
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("INSERT INTO meta VALUES ('held', '1')")
        try:
            with serving(tmp_path, tmp_path / "runs") as served:
                text = served.get("/").text
                assert "database is locked; another process holds it; try again when it is done" in text
                assert "120 of 120" in text  # the free one
        finally:
            holder.close()


class TestToken:
    def test_without_it_everything_is_401(self, guarded):
        for path in ("/", "/compare", "/_equipoise/static/dashboard.js", "/_nicegui_ws/socket.io/?EIO=4", "/nowhere"):
            assert guarded.get(path).status == 401, path
        assert guarded.get("/?token=wrong-wrong-wrong").status == 401

    def test_with_it_the_page_opens(self, guarded):
        assert guarded.address.endswith(f"/?token={TOKEN}")
        welcome = guarded.get(f"/?token={TOKEN}")
        assert (welcome.status, welcome.headers["location"]) == (303, "/")
        cookie = welcome.headers["set-cookie"].partition(";")[0]
        assert "Runs" in guarded.get("/", Cookie=cookie).text
        assert guarded.get("/", Authorization=f"Bearer {TOKEN}").status == 200

    def test_a_websocket_without_it_is_refused(self, guarded):
        assert handshake(guarded.port, "/_nicegui_ws/socket.io/?EIO=4&transport=websocket") == 401

    def test_a_websocket_of_a_page_elsewhere_is_refused(self, server):
        path = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
        assert handshake(server.port, path, origin="http://evil.example") == 403
        assert handshake(server.port, path, origin=server.base) == 101


def handshake(port: int, path: str, origin: str = "") -> int:
    """The status of a websocket's handshake."""
    lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: Upgrade", "Upgrade: websocket"]
    lines += ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    lines += [f"Origin: {origin}"] if origin else []
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        return int(connection.recv(100).split()[1])


class TestStarting:
    def test_another_host_without_a_token(self, folder):
        with pytest.raises(ValueError, match=r"0\.0\.0\.0 can be reached from other machines, and there is no token"):
            serve([folder], host="0.0.0.0")

    def test_a_port_in_use(self, folder, server):
        with pytest.raises(ValueError, match=f"port: {server.port} is in use; choose another with --port, or 0"):
            serve([folder], port=server.port)

    def test_a_host_of_another_machine(self, folder):
        with pytest.raises(ValueError, match=r"host: cannot listen on 192\.0\.2\.1"):
            serve([folder], host="192.0.2.1", port=0, token=TOKEN)

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist; name a run folder"):
            serve([tmp_path / "gone"])

    def test_without_the_extra_the_error_names_it(self, tmp_path):
        code = (
            "import sys; sys.modules['nicegui'] = None\n"
            "from pathlib import Path\nfrom equipoise.dashboard import serve\n"
            "try:\n    serve([Path(sys.argv[1])], port=0)\nexcept ImportError as error:\n    print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
        assert "pip install 'equipoise[dashboard]'" in done.stdout

    def test_importing_it_imports_no_nicegui(self):
        code = "import sys, equipoise.commands.dashboard, equipoise.dashboard.page_run; print('nicegui' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == "False"

    def test_the_package_has_its_style_sheet_and_script(self):
        import equipoise.dashboard

        static = Path(equipoise.dashboard.__file__).parent / "static"
        assert {path.name for path in static.iterdir()} == {"dashboard.css", "dashboard.js"}
        assert not any("://" in path.read_text() for path in static.iterdir())


class TestCommand:
    """`equipoise dashboard` as tyro reads it; what it serves is tested above."""

    def test_its_arguments_reach_the_server(self, folder, tmp_path):
        (tmp_path / "token").write_text("short\n")
        with pytest.raises(ValueError, match="token: expected at least 8 printable ASCII characters, got 5"):
            tyro.cli(dashboard, args=[str(folder), "--token-file", str(tmp_path / "token"), "--port", "0"])
        with pytest.raises(ValueError, match=r"host: example\.org can be reached from other machines"):
            tyro.cli(dashboard, args=[str(folder), "--host", "example.org"])
        with pytest.raises(ValueError, match="gone does not exist"):
            tyro.cli(dashboard, args=[str(folder), str(tmp_path / "gone")])

    def test_it_says_where_and_ends_at_ctrl_c(self, folder):
        code = "import sys, tyro\nfrom equipoise.commands.dashboard import dashboard\nsys.exit(tyro.cli(dashboard))"
        command = [sys.executable, "-c", code, str(folder), "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            said = re.fullmatch(
                r"dashboard at (http://127\.0\.0\.1:\d+/)  \(Ctrl-C ends it\)\n", process.stdout.readline()
            )
            assert Served(said[1], folder).get("/").status == 200
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
