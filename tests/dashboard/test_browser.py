"""The pages in a real browser: pushed while a run is written, with the keyboard, in both themes, without a network."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from tests.dashboard.conftest import serving
from tests.dashboard.stores import make_roles, together, window, write_ladder, write_run

from equipoise.dashboard.runs import run_ref
from equipoise.monitor.alerts import AlertBook
from equipoise.monitor.detectors import CollapseDetector
from equipoise.monitor.specialisation import FILE_NAME
from equipoise.monitor.store import RunStore
from equipoise.types import Action

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nicegui")]

LAYERS = ["layers.0.mlp", "layers.1.mlp"]
HOSTILE = ["<script>window.pwned=1</script>", "`${window.pwned=1}`</script><img src=x onerror=window.pwned=1>"]
PUSH = 5_000  # milliseconds from a flush to the page
LOAD = 30_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "good", incident=True)
    write_ladder(folder / "ladder")
    write_run(folder / "<img src=x onerror=window.pwned=1>", layers=HOSTILE, name=HOSTILE[0], incident=True)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    pytest.importorskip("nicegui", reason="needs the extra: pip install 'equipoise[dashboard]'")
    with serving(tmp_path_factory.mktemp("server"), folder) as served:
        yield served
    assert "Traceback" not in served.log.read_text()


@pytest.fixture
def expect(browser):
    from playwright.sync_api import expect

    return expect


class Visit:
    """A page in a browser of its own, with what went wrong in it and what it asked for."""

    def __init__(self, browser, width=1440, height=900, theme="light"):
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(LOAD)
        self.errors, self.requests = [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("websocket", lambda each: self.requests.append(each.url))

    def open(self, url):
        self.page.goto(url)
        self.page.wait_for_function("window.did_handshake === true")
        return self.page


@pytest.fixture
def visit(browser):
    visits = []

    def make(**settings):
        visits.append(Visit(browser, **settings))
        return visits[-1]

    yield make
    for each in visits:
        each.context.close()


class Training:
    """Writes a run as training does: statistics, what the detector says of them, and a repair."""

    def __init__(self, path, flushes=3):
        write_run(path, flushes=flushes, status="running")
        self.store = RunStore(path)
        self.book, self.detector, self.step = AlertBook(), CollapseDetector(), 10 * flushes

    def flush(self, broken=None):
        self.step += 10
        records = window(LAYERS, self.step, broken=broken)
        with self.store.transaction():
            self.store.scalars(self.step, {"loss": 3.0})
            self.store.routing(records)
            for alert in self.book.observe(self.step, self.detector(records)):
                self.store.alert(alert)


@pytest.fixture
def training(tmp_path):
    training = Training(tmp_path / "runs" / "live")
    yield training
    training.store.close()


class TestLive:
    def test_a_collapse_its_repair_and_its_end_appear_by_themselves(self, training, tmp_path, visit, expect):
        with serving(tmp_path, tmp_path / "runs") as served:
            home, run = visit(), visit()
            listed = home.open(served.base)
            page = run.open(f"{served.base}/run/{run_ref(tmp_path / 'runs' / 'live').id}")
            for each in (listed, page):
                each.evaluate("window.never_reloaded = true")
            expect(page.locator(".slider-label")).to_have_text("step 30 of 30 · newest")

            training.flush(broken="layers.1.mlp")
            expect(page.locator(".slider-label")).to_have_text("step 40 of 40 · newest", timeout=PUSH)
            expect(page.locator("tr", has_text="layers.1")).to_contain_text("1.1 of 8", timeout=PUSH)
            training.flush(broken="layers.1.mlp")  # the alert fires at the second flush in a row
            expect(page.locator(".banner")).to_contain_text("layers.1.mlp has collapsed: expert 5", timeout=PUSH)
            expect(page.locator(".pill").first).to_have_text("1 alert firing", timeout=PUSH)
            expect(listed.locator(".pill")).to_have_text("1 alert firing", timeout=PUSH)
            hottest = """() => { const e = document.querySelector('.load-card .echart');
                const cells = getElement(Number(e.id.slice(1))).chart.getOption().series[0].data;
                const row = cells.filter((cell) => cell.value[1] === 1).sort((a, b) => b.value[2] - a.value[2]);
                return row[0].value[0] }"""
            assert page.evaluate(hottest) == 5

            begun = Action(
                "quantile_bias", "layers.1.mlp", training.step, "layers.1.mlp:collapse", {"loss_before": 2.3}
            )
            training.store.action(begun)
            expect(page.locator(".event .diamond.applied")).to_have_count(1, timeout=PUSH)
            expect(page.locator(".banner")).to_contain_text("Last repair: quantile_bias on layers.1.mlp", timeout=PUSH)
            expect(listed.locator(".cell.repairs")).to_contain_text("1", timeout=PUSH)
            for _ in range(2):
                training.flush()
            training.store.action(replace(begun, step=training.step, state="kept", detail={"steps": 20.0}))
            expect(page.locator(".event .diamond.kept")).to_have_count(1, timeout=PUSH)
            expect(page.locator(".event .diamond")).to_have_count(1)
            expect(page.locator(".banner")).to_have_count(0, timeout=PUSH)
            expect(listed.locator(".pill")).to_have_text("running", timeout=PUSH)
            expect(page.locator(".event")).to_contain_text("resolved at 70")
            assert all(each.evaluate("window.never_reloaded") for each in (listed, page))
            assert home.errors == run.errors == []
        assert "Traceback" not in served.log.read_text()

    def test_a_new_run_appears_in_the_list(self, training, tmp_path, visit, expect):
        with serving(tmp_path, tmp_path / "runs") as served:
            page = visit().open(served.base)
            expect(page.locator(".run")).to_have_count(1)
            write_run(tmp_path / "runs" / "later")
            expect(page.locator(".run")).to_have_count(2, timeout=2 * PUSH)
            expect(page.locator(".run").last).to_contain_text("later")

    def test_browsers_that_disconnect_break_nothing(self, training, tmp_path, visit, expect):
        with serving(tmp_path, tmp_path / "runs") as served:
            address = f"{served.base}/run/{run_ref(tmp_path / 'runs' / 'live').id}"
            leaving = [visit() for _ in range(3)]
            for each in leaving:
                each.open(address)
            leaving[0].context.close()  # the tab is closed
            leaving[1].context.set_offline(True)  # the network is gone, the tab stays
            training.flush()
            staying = visit().open(address)
            leaving[2].page.goto("about:blank")
            training.flush(broken="layers.0.mlp")
            expect(staying.locator(".slider-label")).to_have_text("step 50 of 50 · newest", timeout=PUSH)
            assert served.get("/").status == 200
        log = served.log.read_text()
        assert "Traceback" not in log, log

    def test_a_file_that_breaks_while_it_is_shown(self, tmp_path, visit, expect):
        run = write_run(tmp_path / "runs" / "breaking")
        with serving(tmp_path, tmp_path / "runs") as served:
            page = visit().open(f"{served.base}/run/{run_ref(run).id}")
            (run / "run.sqlite").write_bytes(b"certainly not SQLite" * 100)
            expect(page.locator(".error").first).to_contain_text("This run cannot be read", timeout=PUSH)
            expect(page.locator(".slider-label")).to_be_visible()  # what was read before stays


class TestBig:
    def test_a_big_model_is_pushed_and_its_cells_are_drawn(self, tmp_path, visit, expect):
        layers = [f"model.layers.{i}.mlp" for i in range(61)]
        run = write_run(tmp_path / "runs" / "big", layers=layers, num_experts=256, flushes=4, status="running")
        with serving(tmp_path, tmp_path / "runs") as served:
            seen = visit()
            page = seen.open(f"{served.base}/run/{run_ref(run).id}")
            with RunStore(run) as store:
                store.routing(window(layers, 50, 256, broken=layers[7]))
            expect(page.locator(".slider-label")).to_have_text("step 50 of 50 · newest", timeout=PUSH)
            hottest = """() => { const e = document.querySelector('.load-card .echart');
                const data = getElement(Number(e.id.slice(1))).chart.getOption().series[0].data;
                const [most] = data.slice().sort((a, b) => b[2] - a[2]);
                return [data.length, most[0], most[1]] }"""
            page.wait_for_function(f"String(({hottest})()) === '{61 * 256},5,7'", timeout=PUSH)
            assert seen.errors == []


class TestHands:
    def test_the_slider_with_the_keyboard(self, server, folder, visit, expect):
        page = visit().open(f"{server.base}/run/{run_ref(folder / 'good').id}")
        slider, label = page.locator("input[type=range]"), page.locator(".slider-label")
        expect(slider).to_have_value("11")
        slider.focus()
        page.keyboard.press("ArrowLeft")
        expect(label).to_have_text("step 110 of 120")
        expect(page.locator(".small-button")).to_have_attribute("aria-pressed", "false")
        page.keyboard.press("Home")
        expect(label).to_have_text("step 10 of 120")
        expect(slider).to_have_attribute("aria-valuetext", "step 10")
        expect(page).to_have_url(re.compile(r"\?step=10$"))
        for _ in range(5):
            page.keyboard.press("ArrowRight")
        expect(label).to_have_text("step 60 of 120")
        expect(page.locator("tr", has_text="layers.1")).to_contain_text("1.1 of 8")  # the collapse
        page.reload()
        expect(label).to_have_text("step 60 of 120")  # the address has it
        expect(slider).to_have_value("5")
        page.locator(".small-button").press("Enter")
        expect(label).to_have_text("step 120 of 120 · newest")
        expect(slider).to_have_value("11")

    def test_tab_reaches_everything_and_shows_where_it_is(self, server, folder, visit):
        page = visit().open(f"{server.base}/run/{run_ref(folder / 'good').id}")
        seen = []
        for _ in range(13):  # all there are: from the skip link to the alert in the timeline
            page.keyboard.press("Tab")
            seen.append(
                page.evaluate("""() => { const e = document.activeElement, s = getComputedStyle(e);
                    return [e.textContent || e.type, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2] }""")
            )
        names = [name for name, _ in seen]
        order = ["Skip to content", "equipoise", "Runs", "Compare", "Theme: auto", "Follow newest", "range"]
        assert [name for name in names if name in order] == order
        assert "layers.0" in names
        assert [name for name, visible in seen if not visible] == []

    def test_another_layer(self, server, folder, visit, expect):
        page = visit().open(f"{server.base}/run/{run_ref(folder / 'good').id}")
        expect(page.locator(".chooser select").first).to_have_value("layers.1.mlp")  # the one with the alert
        page.locator(".link-button", has_text="layers.0").press("Enter")
        expect(page.locator(".chooser select").first).to_have_value("layers.0.mlp")
        expect(page.locator("figure", has_text="Experts over time").locator(".reading")).to_have_text("layers.0.mlp")
        page.locator(".chooser select").first.select_option("layers.1.mlp")
        expect(page.locator("tr.chosen")).to_contain_text("layers.1")
        expect(page).to_have_url(re.compile(r"layer=layers\.1\.mlp"))

    def test_a_server_shows_its_speed_in_place_of_a_loss(self, server, folder, visit, expect):
        run = folder / "ladder"
        page = visit().open(f"{server.base}/run/{run_ref(run).id}")
        expect(page.locator("figure", has_text="Validation perplexity")).to_be_visible()
        expect(page.locator("figure", has_text="Time to first token")).to_be_hidden()
        with RunStore(run) as store:
            store.set_meta(kind="server")
            store.scalars(200, {"time_to_first_token_ms.p50": 12.0, "time_to_first_token_ms.p99": 34.0})
        first = page.locator("figure", has_text="Time to first token")
        expect(first.locator(".reading")).to_have_text("p50 12, p99 34")
        expect(first.locator("canvas").first).to_be_visible()
        expect(page.locator("figure", has_text="Validation perplexity")).to_be_hidden()

    def test_a_server_that_times_single_experts_shows_each(self, tmp_path, visit, expect):
        run = write_run(tmp_path / "runs" / "server", status="running")
        with RunStore(run) as store:
            store.set_meta(kind="server")
        with serving(tmp_path, tmp_path / "runs") as served:
            page = visit().open(f"{served.base}/run/{run_ref(run).id}?layer=layers.1.mlp")
            figure = page.locator("figure", has_text="Time of each expert")
            expect(page.locator("figure", has_text="Between tokens")).to_be_visible()
            expect(figure).to_be_hidden()
            with RunStore(run) as store:
                names = {f"experts_ms.layers.1.mlp/{expert}" for expert in range(8) if expert != 6}
                store.scalars(120, {f"{name}.p50": 1.5 for name in names} | {f"{name}.p99": 2.0 for name in names})
                store.scalars(120, {"experts_ms.layers.1.mlp/3.p99": 34.0})
            expect(figure.locator(".reading")).to_have_text("layers.1.mlp; slowest: expert 3, p50 1.5, p99 34")
            expect(figure.locator("canvas").first).to_be_visible()
            heights = """() => { const f = [...document.querySelectorAll('figure')].find(
                e => e.textContent.includes('Time of each expert'));
                return getElement(Number(f.querySelector('.echart').id.slice(1))).chart.getOption()
                    .series.map((each) => each.data) }"""
            half, most = page.evaluate(heights)
            assert half == [1.5] * 6 + [None, 1.5]
            assert most == [2, 2, 2, 34, 2, 2, None, 2]
            page.locator(".chooser select").first.select_option("layers.0.mlp")
            expect(figure).to_be_hidden()

    def test_what_is_chosen_together(self, server, folder, visit, expect):
        run = folder / "ladder"
        page = visit().open(f"{server.base}/run/{run_ref(run).id}?layer=layers.0.mlp")
        figure = page.locator("figure", has_text="Experts chosen together")
        expect(page.locator("p", has_text="Not recorded. This run")).to_be_visible()
        expect(figure).to_be_hidden()
        with RunStore(run) as store:
            store.co_selection([together("layers.0.mlp", 200), together("layers.1.mlp", 200, k=1)])
        expect(figure.locator(".reading")).to_contain_text("400 tokens sampled up to step 200; strongest:")
        expect(figure.locator("canvas").first).to_be_visible()
        page.locator(".chooser select").first.select_option("layers.1.mlp")
        expect(page.locator("p", has_text="Each token has one expert")).to_be_visible()
        expect(figure).to_be_hidden()

    def test_what_the_experts_serve(self, server, folder, visit, expect):
        run = folder / "ladder"
        seen = visit()
        page = seen.open(f"{server.base}/run/{run_ref(run).id}")
        page.locator("a", has_text="Specialisation").click()
        page.wait_for_function("window.did_handshake === true")
        expect(page.locator(".command")).to_have_text(f"equipoise specialise {run}")
        expect(page.locator("figure", has_text="Domains")).to_be_hidden()
        (run / FILE_NAME).write_bytes(make_roles(words=("the", HOSTILE[0][:20])).to_json())
        figure = page.locator("figure", has_text="Domains")
        expect(figure.locator(".reading")).to_contain_text("times chance")  # it has appeared by itself
        expect(figure.locator("canvas").first).to_be_visible()
        expect(page.locator(".command")).to_be_hidden()
        expect(page.locator(".role-card")).to_have_count(4)
        expect(page.locator(".role-card").first).to_contain_text("no words beyond chance")
        expect(page.locator(".role-card").nth(1).locator(".word")).to_have_text(["the", HOSTILE[0][:20]])
        page.locator(".chooser select").select_option("layers.0.mlp")
        expect(page).to_have_url(re.compile(r"layer=layers\.0\.mlp"))
        expect(page.locator("figure", has_text="as they end").locator(".reading")).to_have_text(
            "by chance 50 % in layers.0.mlp"
        )
        (run / FILE_NAME).write_bytes(b"{")
        expect(page.locator(".error").first).to_contain_text("make it anew with equipoise specialise")
        expect(figure).to_be_hidden()
        (run / FILE_NAME).unlink()
        expect(page.locator(".command")).to_be_visible()
        assert seen.errors == []

    def test_an_incident_and_the_way_back(self, server, folder, visit, expect):
        page = visit().open(f"{server.base}/run/{run_ref(folder / 'good').id}")
        page.locator(".event a").click()
        expect(page.locator("h1")).to_have_text("Collapse in layers.1.mlp, expert 5")
        expect(page.locator("figure .echart")).to_have_count(4)  # before, when it fired, after, and around it
        expect(page.locator(".story li")).to_have_count(4)
        page.locator(".back").click()
        expect(page.locator("h1")).to_have_text("good")

    def test_the_timeline_tells_repairs_apart(self, server, folder, visit, expect):
        page = visit().open(f"{server.base}/run/{run_ref(folder / 'ladder').id}")
        drawn = page.locator(".track .diamond").evaluate_all("all => all.map(e => e.classList[1])")
        # the newest incident first: boost; the input; reseed, router_rollback, the page; quantile_bias, spill
        assert drawn == ["applied", "proposed", "failed", "undone", "page", "undone", "kept"]
        expect(page.locator(".timeline-key li")).to_have_count(6)
        expect(page.locator(".event").last).to_contain_text("repairs: 1 undone, 1 kept")
        boxes = (
            page.locator(".event")
            .last.locator(".diamond")
            .evaluate_all("all => all.map(e => e.getBoundingClientRect().x)")
        )
        assert boxes[1] - boxes[0] >= 14  # made at the same step, and yet beside each other
        expect(page.locator(".title-row").first).to_contain_text("4 repairs")

    def test_the_story_of_a_ladder(self, server, folder, visit, expect):
        run = run_ref(folder / "ladder").id
        seen = visit()
        page = seen.open(f"{server.base}/run/{run}/incident?key=layers.1.mlp%3Acollapse&since=180")
        kinds = page.locator(".story li").evaluate_all("all => all.map(e => e.className)")
        assert kinds == ["", "critical", "failed", "applied", "undone", "page", "good"]
        expect(page.locator(".story li").nth(4)).to_contain_text("Undone after 40 steps: router_rollback")
        expect(page.locator(".story li").nth(4)).to_contain_text("the alert fires still, 4 flushes later")
        table = page.locator("section", has=page.locator("#repairs"))
        expect(table.locator("tbody tr")).to_have_count(2)
        expect(table.locator("tbody tr").nth(1)).to_contain_text("9.974 → 10.07")
        page.locator(".see-also").click()
        expect(page.locator("h1")).to_have_text("recovery_exhausted in layers.1.mlp")
        expect(page.locator(".story li.page")).to_contain_text("A human is called")
        page.locator(".see-also").click()
        expect(page.locator("h1")).to_have_text("Collapse in layers.1.mlp, expert 5")
        assert seen.errors == []

    def test_an_incident_long_past(self, server, folder, visit, expect):
        """Nothing on its page can change any more when it is drawn for the first time."""
        run = run_ref(folder / "ladder").id
        page = visit().open(f"{server.base}/run/{run}/incident?key=layers.1.mlp%3Acollapse&since=60")
        expect(page.locator(".story li.kept")).to_contain_text("MaxVio 6.86 → 0.21")

    def test_comparing(self, server, folder, visit, expect):
        first, second = run_ref(folder / "good").id, run_ref(folder / "<img src=x onerror=window.pwned=1>").id
        page = visit().open(f"{server.base}/compare?a={first}&b={second}")
        expect(page.locator("figure", has_text="Loss").locator(".reading")).to_contain_text("good 2.847; <img src=x")
        page.locator("input[type=range]").focus()
        page.keyboard.press("Home")
        expect(page.locator("figure", has_text="Second").first.locator(".reading")).to_contain_text("step 10")
        page.locator("select").nth(1).select_option(first)
        expect(page.locator("figure", has_text="Loss").locator(".reading")).to_have_text(
            "good (a) 2.847; good (b) 2.847"
        )

    def test_comparing_what_is_chosen_together(self, tmp_path, visit, expect):
        runs = [write_run(tmp_path / "runs" / name) for name in ("a", "b")]
        ids = [run_ref(run).id for run in runs]
        with serving(tmp_path, tmp_path / "runs") as served:
            seen = visit()
            page = seen.open(f"{served.base}/compare?a={ids[0]}&b={ids[1]}")
            first, second, apart = (
                page.locator("figure", has=page.locator(f"h3:text-is('Chosen together: {title}')"))
                for title in ("first", "second", "second against first")
            )
            expect(page.locator("p", has_text="a: Not recorded.")).to_be_visible()
            for figure in (first, second, apart):
                expect(figure).to_be_hidden()
            with RunStore(runs[0]) as store:
                store.co_selection([together("layers.0.mlp", 120), together("layers.1.mlp", 120)])
            expect(first.locator(".reading")).to_contain_text("a, 400 tokens up to step 120; strongest: 1 and 2")
            expect(page.locator("p", has_text="b: Not recorded.")).to_be_visible()
            expect(apart).to_be_hidden()
            with RunStore(runs[1]) as store:
                found = [together("layers.0.mlp", 120, k=3), together("layers.1.mlp", 120, num_experts=6)]
                store.co_selection(found)
            expect(apart.locator(".reading")).to_contain_text("most different:")
            for figure in (first, second, apart):
                expect(figure.locator("canvas").first).to_be_visible()
            page.locator("select").nth(2).select_option("1")
            expect(apart.locator(".reading")).to_have_text("they have 8 and 6 experts")
            expect(second.locator(".reading")).to_contain_text("b, 400 tokens")
            assert seen.errors == []


class TestLook:
    @pytest.mark.parametrize("theme", ["light", "dark"])
    @pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 844)], ids=["laptop", "phone"])
    def test_every_page_fits_and_asks_only_us(self, server, folder, visit, theme, width, height):
        run = run_ref(folder / "good").id
        seen = visit(width=width, height=height, theme=theme)
        of_ladder = [f"/run/{run_ref(folder / 'ladder').id}/incident?key=layers.1.mlp%3Acollapse&since={since}"
                     for since in (60, 180, 330)]  # fmt: skip
        incident = f"/run/{run}/incident?key=layers.1.mlp%3Acollapse&since=60"
        for path in ("/", f"/run/{run}", f"/run/{run_ref(folder / 'ladder').id}", incident, *of_ladder, "/compare"):
            page = seen.open(server.base + path)
            page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path
        hosts = {request for request in seen.requests if not re.match(r"(https?|wss?)://127\.0\.0\.1:|data:", request)}
        assert hosts == set()
        assert seen.errors == []

    def test_the_theme_is_changed_kept_and_reaches_the_charts(self, server, folder, visit, expect):
        page = visit(theme="light").open(f"{server.base}/run/{run_ref(folder / 'good').id}")
        ink = """() => getElement(Number(document.querySelector('.load-card .echart').id.slice(1)))
            .chart.getOption().tooltip[0].textStyle.color"""
        assert page.evaluate(ink) == "#12161c"
        button = page.locator("[data-theme-button]")
        button.click()  # light
        button.click()  # dark
        expect(button).to_have_text("Theme: dark")
        page.wait_for_function(f"({ink})() === '#e9edf2'")
        page.reload()
        expect(button).to_have_text("Theme: dark")
        page.wait_for_function("document.querySelector('.load-card canvas') !== null")
        page.wait_for_function(f"({ink})() === '#e9edf2'")

    def test_hostile_names_are_shown_and_never_run(self, server, folder, visit, expect):
        run = run_ref(folder / "<img src=x onerror=window.pwned=1>").id
        seen = visit()
        for path in ("/", f"/run/{run}", "/compare", f"/run/{run}/incident?key=%3Cscript%3Ewindow.pwned=1&since=1"):
            page = seen.open(server.base + path)
            page.wait_for_load_state("networkidle")
            assert page.evaluate("window.pwned") is None
        page = seen.open(f"{server.base}/run/{run}")
        expect(page.locator("h1")).to_have_text("<img src=x onerror=window.pwned=1>")
        page.locator(".load-card .echart").hover()
        page.locator(".event a").click()
        expect(page.locator("h1")).to_contain_text("<img src=x onerror=window.pwned=1>")
        assert page.evaluate("window.pwned") is None
        assert page.title().startswith("Incident · <img src=x")
        assert seen.errors == []
