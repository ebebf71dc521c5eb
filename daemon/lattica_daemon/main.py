"""`latticad`: the daemon alone. The `lattica` command starts it too (`lattica up`).

Exit codes: 0 ended in order, 1 cannot run (one line on standard error says why), 2 wrong usage or settings.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lattica._version import __version__
from lattica.errors import ConfigError, LatticaError
from lattica.local.paths import default_home
from lattica_daemon.home import Home, check_platform
from lattica_daemon.settings import Settings, example_toml, load

EXIT_FAILED = 1
EXIT_USAGE = 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"latticad: {message}. See `latticad --help`.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; the exit code."""
    options = _parser().parse_args(argv)
    try:
        check_platform()
        home = Home(Path(options.home).expanduser() if options.home else default_home())
        if options.check_config is not None:
            return _check_config(Path(options.check_config))
        if options.init_config:
            return _init_config(home)
        config_file = Path(options.config) if options.config else None
        flags = _flags(options)
        settings = _load(home, config_file, flags)
        if options.show_config:
            _print({"running": False, "home": str(home.path), "settings": settings.describe()})
            return 0
        return _run(home, settings, config_file, flags, ready_as_json=options.json)
    except ConfigError as error:
        return _fail(error, EXIT_USAGE)
    except LatticaError as error:
        return _fail(error, EXIT_FAILED)
    except OSError as error:  # an address in use, a disk that is full: the system's own words, without its number
        words = error.strerror or str(error)
        return _fail(LatticaError(f"{error.filename}: {words}" if error.filename else words), EXIT_FAILED)


def _run(
    home: Home,
    settings: Settings,
    config_file: Path | None,
    flags: dict[str, tuple[str, object]],
    *,
    ready_as_json: bool,
) -> int:
    with home:
        home.acquire()
        from lattica_daemon import run  # the node and all it needs: only now, so that refusals come at once

        run.run_daemon(home, settings, lambda: _load(home, config_file, flags), ready_as_json=ready_as_json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="latticad",
        description="The Lattica daemon. SIGTERM drains and ends it, SIGHUP reads the log level and peer rules again.",
        allow_abbrev=False,
    )
    parser.add_argument("--home", metavar="DIR", help="state directory (LATTICA_HOME; default: XDG state)")
    parser.add_argument("--config", metavar="FILE", help="settings file (default: HOME/config.toml if there is one)")
    parser.add_argument("--listen", metavar="ADDR", action="append", help="listen here instead; repeatable")
    parser.add_argument("--announce", metavar="ADDR", action="append", help="address to tell others; repeatable")
    parser.add_argument("--bootstrap", metavar="ADDR", action="append", help="a peer to start from; repeatable")
    parser.add_argument("--relay", action=argparse.BooleanOptionalAction, help="carry other peers' connections")
    parser.add_argument("--mdns", action=argparse.BooleanOptionalAction, help="find peers in the local network")
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    parser.add_argument("--log-format", metavar="FORMAT", help="text or json")
    parser.add_argument("--json", action="store_true", help="print the ready line as JSON")
    parser.add_argument("--version", action="version", version=f"latticad {__version__}")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show-config", action="store_true", help="print the settings in force as JSON and exit")
    what.add_argument("--check-config", metavar="FILE", help="say whether a settings file is right and exit")
    what.add_argument("--init-config", action="store_true", help="write an explained settings file and exit")
    return parser


def _flags(options: argparse.Namespace) -> dict[str, tuple[str, object]]:
    given = {
        "listen.addrs": ("--listen", options.listen),
        "listen.announce": ("--announce", options.announce),
        "discovery.bootstrap": ("--bootstrap", options.bootstrap),
        "relay.serve": ("--relay", None if options.relay is None else "on" if options.relay else "off"),
        "discovery.mdns": ("--mdns", None if options.mdns is None else "on" if options.mdns else "off"),
        "log.level": ("--log-level", options.log_level),
        "log.format": ("--log-format", options.log_format),
    }
    return {key: (name, value) for key, (name, value) in given.items() if value is not None}


def _load(home: Home, config_file: Path | None, flags: dict[str, tuple[str, object]]) -> Settings:
    file = config_file
    if file is None and home.config_path.exists():
        file = home.config_path
    return load(file, flags=flags)


def _check_config(file: Path) -> int:
    settings = load(file, environ={})
    _print({"ok": True, "path": str(file), "settings": len(settings.sources)})
    return 0


def _init_config(home: Home) -> int:
    home.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        fd = os.open(home.config_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise LatticaError(f"{home.config_path} is there already and was left alone") from None
    with open(fd, "w", encoding="utf-8") as file:
        file.write(example_toml())
    _print({"path": str(home.config_path)})
    return 0


def _print(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def _fail(error: Exception, code: int) -> int:
    sys.stderr.write("latticad: " + " ".join(str(error).split()) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
