"""The page of `timm-cbam2 app` in a real browser, what it refuses, and the Space made of it.

Screenshots are kept in screenshots/, which git ignores.
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_hub import scenario

from timm_cbam2.errors import UserError

pytest.importorskip("gradio", reason='the page needs gradio: pip install "timm_cbam2[app]"')

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "screenshots"
CAT = ROOT / "timm_cbam2" / "examples" / "cat.jpg"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WAIT = 30_000  # ms; a busy machine is slow, a broken page is slower


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(command, cwd, environment):
    """Start a page; its process and address."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, cwd=cwd, env=environment, **pipes)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if found := re.search(r"http://[\d.]+:\d+", line):
            return process, found[0]
    raise AssertionError("".join(printed))


def stop(process):
    process.terminate()
    try:
        process.wait(20)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def address(start, small_run):
    """Of a page that shows a run, started with no more than its name."""
    page = start("app", small_run[0], "--port", free_port())
    while not (url := re.search(r"http://[\d.]+:\d+", page.out())):
        assert page.alive, page.wait()
        time.sleep(0.05)
    yield url[0]
    page.kill(signal.SIGINT)
    page.wait()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="browser tests need the playwright package")
    if CHROMIUM is None:
        pytest.skip("browser tests need chromium, such as Debian's: apt-get install chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    """A fresh page; whatever the test, it asks nobody else for anything, and its console shows no error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    foreign, errors = [], []
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else foreign.append(r.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: (errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(address)
    page.get_by_text("What does it attend to?").wait_for()
    yield page
    context.close()
    assert not foreign and not errors


def upload(page, path):
    remove = page.get_by_label("Remove Image").first
    if remove.is_visible():
        remove.click()
        remove.wait_for(state="hidden")
    page.locator("input[type=file]").first.set_input_files(path)


def choose(page, label, option):
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option).click()


def shot(page, name):
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


def wait_for_text(page, selector, text):
    page.locator(selector).filter(has_text=text).first.wait_for()


def test_upload_a_picture_move_the_slider_download(page, run, small_run, tmp_path):
    upload(page, CAT)
    page.locator("#first .answer").nth(2).wait_for()
    answers = page.locator("#first .answer").all_inner_texts()
    said = run("predict", small_run[0], CAT).out.partition(": ")[2].strip().split(", ")
    assert [a.strip() for a in answers] == said  # the command gives the same three answers
    assert "3x3 dilated 3" in page.locator("#first").inner_text()
    assert page.locator("#first .bars").count() == 2 and page.locator("#second").is_hidden()

    seen = {}
    for stage in (0, 1, 2, 3):
        page.locator("#stage input[type=number]").fill(str(stage))
        page.locator("#stage input[type=number]").press("Enter")
        wait_for_text(page, "#first .seen", f"layer{stage}.2" if stage else "as the model sees it")
        seen[stage] = page.locator("#first .seen img").get_attribute("src")
    assert len(set(seen.values())) == 4
    slider = page.locator("#stage input[type=range]")
    slider.focus()
    slider.press("ArrowLeft")
    wait_for_text(page, "#first .seen", "layer2.2")
    assert page.locator("#first .seen img").get_attribute("src") == seen[2]
    page.get_by_label("every block").check()
    wait_for_text(page, "#first .seen", "layer1.1")
    page.get_by_label("every block").uncheck()
    wait_for_text(page, "#first .seen", "layer2.2")
    shot(page, "look")

    with page.expect_download() as download:
        page.locator("#arrays").click()
    download.value.save_as(tmp_path / "arrays.npz")
    arrays = np.load(tmp_path / "arrays.npz")
    assert arrays["layer1.0.se/channel_mask"].shape == (16, 1, 1) and len(arrays["classes"]) == 3
    with page.expect_download() as download:
        page.locator("#picture").click()
    download.value.save_as(tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").width > 800


def test_switch_and_compare_models_and_press_twice(page):
    page.locator(".gallery button, .gallery-item").first.click()  # an example
    page.locator("#first .answer").first.wait_for()
    choose(page, "Model", "resnet20_cbam2")
    wait_for_text(page, "#first .answers", "resnet20_cbam2")
    assert page.locator("#first .answer").count() == 5
    choose(page, "Compare with", "run")
    wait_for_text(page, "#second .answers", "digit")
    assert page.locator("#first .answers").inner_text().startswith("resnet20_cbam2")
    shot(page, "compare")
    choose(page, "Compare with", "(none)")
    page.locator("#second").wait_for(state="hidden")
    assert page.locator("#first").is_visible()

    # Pressing twice quickly.
    choose(page, "Model", "run")
    wait_for_text(page, "#first .answers", "digit")
    before = page.locator("#first .answers").inner_text()
    button = page.get_by_role("button", name="Look")
    button.dblclick()
    button.click()
    choose(page, "Model", "resnet20_cbam2")
    button.click()
    wait_for_text(page, "#first .answers", "resnet20_cbam2")
    page.wait_for_timeout(1000)
    after = page.locator("#first .answers").inner_text()
    assert after != before and after.startswith("resnet20_cbam2") and page.locator("#first .answer").count() == 5


def bomb(side=30_000):
    """A PNG of a few bytes that unpacks to `side` x `side` pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_what_is_no_picture_and_no_model_is_refused(page, tmp_path, truncate):
    page.locator(".gallery button, .gallery-item").first.click()  # an example, which stands there before
    page.locator("#first .answer").first.wait_for()
    (tmp_path / "text.png").write_text("hello\n" * 50)
    (tmp_path / "bomb.png").write_bytes(bomb())
    truncate(tmp_path / "half.jpg")
    for name, words in (("text", "not a picture"), ("bomb", "too many"), ("half", "cannot read this file as an image")):
        upload(page, next(tmp_path.glob(f"{name}.*")))
        wait_for_text(page, "#message .message", words)
        if name != "half":  # which the browser can show, in part
            page.get_by_label("Remove Image").first.wait_for(state="hidden")  # no broken picture is left
        assert page.locator("#first").is_hidden() and str(tmp_path) not in page.locator("#message").inner_text()
        if name == "text":
            shot(page, "refused")
    upload(page, CAT)  # and it goes on
    page.locator("#first .answer").first.wait_for()
    assert page.locator("#message .message").count() == 0

    # Other models are typed, but are never paths.
    for name, words in (
        ("resnet5O_cbam2", "resnet50_cbam2"),
        ("/etc", "the zoo tab lists them"),
        ("local-dir:/etc", "no model is called"),
        ("hf-hub:nobody/nothing", "nothing was loaded"),  # there is no network here
    ):
        box = page.get_by_label("Model", exact=True)
        box.fill(name)
        box.press("Enter")
        page.locator("h1").first.click()
        wait_for_text(page, "#message .message", words)


def test_the_zoo(page):
    page.get_by_role("tab", name="Zoo").click()
    page.locator("#search textarea, #search input").first.fill("resnet20 cifar10")
    zoo = page.locator("#zoo")
    zoo.get_by_text("trained with its attention").filter(visible=True).first.wait_for()
    text = zoo.inner_text()
    assert "resnet20_cbam2" in text and "0.29" in text and "cifar10" in text and "resnet50" not in text
    shot(page, "zoo")


def test_on_a_phone(browser, address):
    context = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.goto(address)
    upload(page, CAT)
    page.locator("#first .answer").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    shot(page, "phone")
    context.close()


def test_a_run_report_in_the_browser(browser, small_run):
    """No request, no error, nothing wider than a phone."""
    page = browser.new_page(viewport={"width": 390, "height": 844})
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    url = (small_run[0] / "report.html").as_uri()
    page.goto(url)
    assert [r for r in requests if not r.startswith("data:")] == [url] and not errors
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    shot(page, "report")
    page.close()


def test_this_machine_only_and_no_large_file(address):
    port = int(address.rpartition(":")[2])
    table = Path("/proc/net/tcp")
    if table.exists():
        bound = [row.split()[1] for row in table.read_text().splitlines()[1:] if row.split()[3] == "0A"]
        assert [b.split(":")[0] for b in bound if int(b.split(":")[1], 16) == port] == ["0100007F"]
    boundary = "x" * 20
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
    body += bytes(21_000_000) + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{address}/gradio_api/upload", body, headers)
    with pytest.raises((urllib.error.HTTPError, ConnectionError, urllib.error.URLError)) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert getattr(caught.value, "code", 413) == 413
    assert urllib.request.urlopen(address, timeout=60).status == 200


def test_mistakes_are_one_line(refused, address):
    refused("app", "resnet2O_cbam2", words=["resnet20_cbam2"])
    refused("app", "nowhere/run", words=["no such run or model folder"])
    refused("app", "resnet20_cbam2", "--port", address.rpartition(":")[2], words=["--port"])


def test_models_that_a_visitor_may_load(tmp_path):
    from timm_cbam2.seeing.page.served import Models, check_image

    models = Models(["resnet20_cbam2", "resnet20_cbam2"])
    assert models.given == ["resnet20_cbam2"]
    assert len(models.explain("resnet20_cbam2", CAT).answers) == 5
    for name, words in (
        (str(ROOT / "checkpoints" / "resnet20_cbam2.cifar10"), "no model is called"),
        ("../run", "no model is called"),
        ("resnet50", "did you mean"),
        ("convnext_xxlarge_cbam2", "this page loads 200 M"),
        ("x" * 500, "^.{0,250}$"),
    ):
        with pytest.raises(UserError, match=words):
            models.explain(name, CAT)
    (tmp_path / "bomb.png").write_bytes(bomb(8000))
    with pytest.raises(UserError, match="8000 x 8000 pixels are too many"):
        check_image(tmp_path / "bomb.png")
    Image.open(io.BytesIO(CAT.read_bytes())).save(tmp_path / "fine.webp")
    check_image(tmp_path / "fine.webp")


def test_models_from_the_hub_run_no_code(script, tmp_path):
    """A repository with code that would leave a trace, and one that offers a pickle only."""
    scenario(
        script,
        tmp_path,
        f"""
from timm_cbam2.seeing.page.served import Models
push_files = {{path.name: path.read_bytes() for path in folder.iterdir()}}
trace = home / "trace"
evil = f"open({{str(trace)!r}}, 'w').close()".encode()
hub.add("user/model", {{**push_files, "modeling_cbam2.py": evil, "configuration_cbam2.py": evil}})
explanation = Models([]).explain("hf-hub:user/model", {str(CAT)!r})
assert len(explanation.answers) == 5 and explanation.blocks and not trace.exists()
hub.add("user/pickle", {{"config.json": push_files["config.json"], "pytorch_model.bin": b"x"}})
fails("pickle", Models([]).explain, "hf-hub:user/pickle", {str(CAT)!r})
fails("no such repository", Models([]).explain, "hf-hub:user/none", {str(CAT)!r})
""",
    )


def test_a_space(script, tmp_path, bare_python, environment):
    """Pushed to the stand-in Hub, fetched, and served where the package is not installed."""
    pytest.importorskip("importlib.metadata").version("timm_cbam2")
    code = """
import json
fails("USER/NAME", push, folder)
fails("write user/name", push, space="demo")
push(space="user/demo", dry_run=True)
os.environ["HF_TOKEN"] = "hf_test"
push(space="user/plain")
push(folder, "user/model", space="user/demo")
push(folder, "user/model", space="user/demo")  # again: the Space is there already
doors("user/model")
files = hub.repos["spaces/user/demo"]["main"]
assert set(files) - set(hub.repos["spaces/user/plain"]["main"]) == {
    "model/model/config.json", "model/model/model.safetensors"}
for name, data in files.items():
    path = home / "space" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
"""
    scenario(script, tmp_path, code)
    space = tmp_path / "space"
    card = (space / "README.md").read_text()
    head = card.split("---")[1]
    for line in ("sdk: gradio", "app_file: app.py", "title: demo", "- user/model", "license: apache-2.0"):
        assert line in head, head
    wanted = (space / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("gradio>=") for line in wanted) and any(line.startswith("timm>=") for line in wanted)
    assert not any("timm_cbam2" in line or "pytest" in line or "extra" in line for line in wanted)
    assert (space / "app.py").read_bytes() == (ROOT / "timm_cbam2" / "seeing" / "page" / "app.py").read_bytes()

    shown = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
    shown.update(SPACE_ID="user/demo", GRADIO_SERVER_NAME="127.0.0.1", GRADIO_SERVER_PORT=str(free_port()))
    process, url = serve([bare_python, "app.py"], space, shown)
    try:
        config = json.loads(urllib.request.urlopen(f"{url}/config", timeout=60).read())
        (first, *_) = (c["props"] for c in config["components"] if c["props"].get("label") == "Model")
        assert first["value"] == "model/model"
    finally:
        stop(process)
    loaded = list(space.glob("timm_cbam2/seeing/__pycache__/explain.*.pyc"))
    assert loaded or os.environ.get("PYTHONDONTWRITEBYTECODE")
