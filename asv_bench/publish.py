"""The dashboard: what `asv publish` makes of the results, with its scripts beside it, so that it needs no network.

    python asv_bench/publish.py OUT [--config asv_bench/asv.conf.json] [--picture FILE]
    python -m http.server --bind 127.0.0.1 --directory OUT

asv's page takes its scripts from other hosts. Here they come from npm when it is built (`npm pack`; each package is
checked against its hash) and lie in OUT/vendor with their licences. `--picture` saves what Chromium shows of it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import http.server
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).with_name("asv.conf.json")


@dataclass(frozen=True)
class Package:
    """A package of npm, its hash as npm gives it, and its files that are taken, by the name that asv links to."""

    name: str
    version: str
    sha512: str
    files: dict[str, str]
    licence: str = "LICENSE.txt"  # or the file that names it
    others: tuple[str, ...] = ()


PACKAGES = (
    Package(
        "jquery",
        "3.3.1",
        "Ubldcmxp5np52/ENotGxlLe6aGMvmF4R8S6tZjsP6Knsaxd/xp3Zrh50cG93lR6nPXyUFwzN3ZSOQI0wRJNdGg==",
        {"jquery-3.3.1.min.js": "dist/jquery.min.js"},
    ),
    Package(
        "flot",
        "0.8.3",
        "xg2otcTJDvS+ERK+my4wxG/ASq90QURXtoM4LhacCq0jQW2jbyjdttbRNqU2cPykrpMvJ6b2uSp6SAgYAzj9tQ==",
        {f"jquery.flot{part}.min.js": f"jquery.flot{part}.js" for part in ("", ".time", ".selection", ".categories")},
    ),
    Package(
        "flot-orderbars",
        "1.0.0",
        "Jv51fvzevUjNXEeozpwEKfPjhiZhfiJddv0WHjduUTCmSF+7T5K7C9c9Y1wIVmUhDBv5fLMjgbwKecT0GIKPZA==",
        {"jquery.flot.orderBars.js": "js/jquery.flot.orderBars.js"},
        licence="package.json",  # MIT, as the head of the script says too
    ),
    Package(
        "stupid-table-plugin",
        "1.1.3",
        "2Vk7XouQPxUQPRe9w0Fu7ZZ8kHLK7rDoLMsCgtKxRNJ7f4dSOGvW9CkHsq5wD6QsaEnWoyLBYH3xOEsrK3yWBg==",
        {"stupidtable.min.js": "stupidtable.min.js"},
        licence="LICENSE",
    ),
    Package(
        "blueimp-md5",
        "2.19.0",
        "DRQrD6gJyy8FbiE4s+bDoXS9hiW3Vbx5uCdwvcCf3zLHL+Iv7LtGHLpr+GZV8rHG8tK766FGYBwRbu8pELTt+w==",
        {"md5.min.js": "js/md5.min.js"},
    ),
    Package(
        "bootstrap",
        "3.1.1",
        "TAzqS8E/ISpVHP29gYhy+1NSV+FJwApDVQhDfgLYsIuUDJiqJzH2DfORN5tiu+Ie2iBLrzEG34t4Rf465cigqg==",
        {"bootstrap.min.js": "dist/js/bootstrap.min.js", "bootstrap.min.css": "dist/css/bootstrap.min.css"},
        licence="LICENSE",
        others=tuple(f"dist/fonts/glyphicons-halflings-regular.{kind}" for kind in ("eot", "svg", "ttf", "woff")),
    ),
)
LINK = re.compile(r"<(?P<begin>script src|link rel=\"stylesheet\" href)=\"(?P<url>https?://[^\"]+)\"[^>]*>")


def publish(config: Path, out: Path) -> None:
    """The dashboard of the results that the configuration names.

    Raises
    ------
    SystemExit
        If there is no npm, or `asv` or npm fails, or a package or asv's page is not as expected.
    """
    if shutil.which("npm") is None:
        sys.exit("the dashboard needs npm, for the scripts of its pages")
    if not config.is_file():
        sys.exit(f"there is no {config}")
    _run([sys.executable, "-m", "asv", "publish", "--config", config.name, "--html-dir", out.resolve()], config.parent)
    for package in PACKAGES:
        _fetch(package, out / "vendor" / package.name)
    page = out / "index.html"
    page.write_text(localized(page.read_text()))


def localized(page: str) -> str:
    """asv's page, with each link to a script or style sheet of another host replaced by one to the copy in vendor/."""
    copies = {name: f"vendor/{package.name}/{path}" for package in PACKAGES for name, path in package.files.items()}

    def replaced(link: re.Match[str]) -> str:
        name = link["url"].rpartition("/")[2]
        if name not in copies:
            sys.exit(f"asv's page links to {link['url']}, which no package is known to have")
        return f'<{link["begin"]}="{copies[name]}">'

    return LINK.sub(replaced, page)


def _fetch(package: Package, target: Path) -> None:
    """The files of a package, from npm, checked against its hash."""
    with tempfile.TemporaryDirectory() as folder:
        name = f"{package.name}@{package.version}"
        _run(["npm", "pack", "--silent", "--pack-destination", folder, name], Path(folder))
        (archive,) = Path(folder).glob("*.tgz")
        found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != package.sha512:
            sys.exit(f"{name} from npm has the hash sha512-{found}; expected sha512-{package.sha512}")
        with tarfile.open(archive) as files:
            for path in (*package.files.values(), *package.others, package.licence):
                content = files.extractfile(f"package/{path}")
                assert content is not None  # the archive is the one that was looked into
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                (target / path).write_bytes(content.read())


def _run(command: list[Any], folder: Path) -> None:
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")


def chromium() -> str | None:
    """Where the system's Chromium is."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextlib.contextmanager
def browser(out: Path) -> Iterator[tuple[Any, str]]:
    """A page of headless Chromium, and the address of the folder, which is served on this machine alone.

    Playwright drives the system's Chromium, not one of its own.
    """
    from playwright.sync_api import sync_playwright  # noqa: PLC0415  for pictures and tests alone

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=out))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with sync_playwright() as playwright:
            launched = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
            page = launched.new_page(viewport={"width": 1280, "height": 800})
            yield page, f"http://127.0.0.1:{server.server_port}/"
            launched.close()
    finally:
        server.shutdown()
        server.server_close()


def save_picture(out: Path, path: Path, benchmark: str = "") -> None:
    """What Chromium shows: the grid of all benchmarks, or the graph of one."""
    with browser(out) as (page, address):
        page.goto(address + (f"#{benchmark}" if benchmark else ""))
        page.wait_for_load_state("networkidle")
        page.screenshot(path=path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--config", type=Path, default=CONFIG, help="asv's configuration")
    parser.add_argument("--picture", type=Path, help="a .png file; needs playwright, and chromium")
    parser.add_argument("--benchmark", default="", help="whose graph the picture shows, in place of the grid")
    options = parser.parse_args()
    if options.picture and (find_spec("playwright") is None or chromium() is None):
        sys.exit("--picture needs the package playwright, and chromium")
    publish(options.config, options.out)
    if options.picture:
        save_picture(options.out, options.picture, options.benchmark)


if __name__ == "__main__":
    main()
