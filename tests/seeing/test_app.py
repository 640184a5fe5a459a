"""The page of `timm-cbam2 app` in a real browser, what it refuses, and the Space made of it.

Screenshots are kept in screenshots/, which git ignores.
"""

import re
import shutil
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from pages import bomb, free_port
from PIL import Image

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
    assert "resnet20_cbam2\n0.3\n" in text and "cifar10" in text and "resnet50" not in text
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
    refused("app", "resnet20_cbam2", "--host", "192.0.2.1", words=["--host 192.0.2.1", "of this machine"])
    refused("app", "resnet20_cbam2", "--port", address.rpartition(":")[2], words=["--port"])
