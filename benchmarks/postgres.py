"""A private PostgreSQL server in a temporary folder, for benchmarks; gone when they end."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BINARIES = Path("/usr/lib/postgresql")
# PostgreSQL does not run as root.
USER = "postgres"
DATABASE = "aiida"
WAIT_SECONDS = 60
REMEDY = "PostgreSQL is not installed, so its rows are left out: apt-get install postgresql"


def find_binaries() -> Path | None:
    """Return the folder with initdb and pg_ctl, of the newest version, if there is one."""
    if there := shutil.which("pg_ctl"):
        return Path(there).resolve().parent
    found = [path.parent for path in BINARIES.glob("*/bin/pg_ctl")]
    return max(found, key=lambda path: float(path.parent.name)) if found else None


@contextmanager
def private_server() -> Iterator[dict[str, Any]]:
    """Start a server with an empty database, as Debian sets it up; stop and remove it at the end.

    Yields what AiiDA's `core.psql_dos` wants to know, and the server's process, ``pid``. It listens
    on a free port of the loopback interface.
    """
    binaries = find_binaries()
    if binaries is None:
        raise SystemExit(REMEDY)
    folder = Path(tempfile.mkdtemp(prefix="eipnn-postgres-"))
    data, log, password = folder / "data", folder / "log", secrets.token_hex(16)
    try:
        (folder / "password").write_text(password)
        if os.geteuid() == 0:
            for path in (folder, folder / "password"):
                shutil.chown(path, USER, USER)
        port = free_port()
        _run(
            folder, binaries / "initdb", f"--pgdata={data}", f"--username={DATABASE}",
            "--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "--encoding=UTF8",
            "--locale=C.UTF-8",
        )  # fmt: skip
        options = (
            f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder}"
        )
        _run(
            folder, binaries / "pg_ctl", f"--pgdata={data}", f"--log={log}", "--wait",
            f"--timeout={WAIT_SECONDS}", f"--options={options}", "start",
        )  # fmt: skip
        configuration = {
            "database_engine": "postgresql_psycopg",
            "database_hostname": "127.0.0.1",
            "database_port": port,
            "database_username": DATABASE,
            "database_password": password,
            "database_name": DATABASE,
        }
        _make_database(configuration)
        yield {**configuration, "pid": int((data / "postmaster.pid").read_text().split()[0])}
    finally:
        if (data / "postmaster.pid").exists():
            _run(
                folder, binaries / "pg_ctl", f"--pgdata={data}", "--mode=immediate", "--wait",
                "stop", check=False,
            )  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, *command: Any, check: bool = True) -> None:
    change = ["runuser", "-u", USER, "--"] if os.geteuid() == 0 else []
    # pg_ctl leaves the server behind, which would keep a pipe open for ever.
    with (folder / "output").open("w+") as output:
        done = subprocess.run(
            [*change, *map(str, command)],
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode and check:
            output.seek(0)
            said = output.read() + _text(folder / "log")
            raise SystemExit(f"{Path(command[0]).name} failed: {said}")
        if done.returncode:
            print(f"{Path(command[0]).name} failed in {folder}", file=sys.stderr)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _make_database(configuration: dict[str, Any]) -> None:
    with _connect(configuration, "postgres") as connection:
        connection.execute(f"create database {DATABASE} template template0 encoding 'UTF8'")


def database_size(configuration: dict[str, Any]) -> int:
    """Return the bytes of the database, with its indices."""
    with _connect(configuration, DATABASE) as connection:
        row = connection.execute("select pg_database_size(current_database())").fetchone()
        return int(row[0])


def _connect(configuration: dict[str, Any], database: str) -> Any:
    import psycopg

    return psycopg.connect(
        host=configuration["database_hostname"],
        port=configuration["database_port"],
        user=configuration["database_username"],
        password=configuration["database_password"],
        dbname=database,
        autocommit=True,
    )


def free_port() -> int:
    """Return a port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
