"""Two nodes on one machine: network namespaces joined by a cable, with an sshd in each.

The namespaces have addresses of their own and share the file system, as cluster nodes share a
network mount. Everything goes when the context ends.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

Command = Sequence[str | Path]

_PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
}
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_NUMBERS = itertools.count()
_PORT = 2222
_SSHD_SECONDS = 20.0
# Where sshd gives up its privileges; it does not start without.
_SSHD_EMPTY = Path("/run/sshd")


@dataclass(frozen=True)
class TwoNodes:
    """Two nodes, numbered 0 and 1; `folder` is where their commands start."""

    folder: Path
    namespaces: tuple[str, str]
    addresses: tuple[str, str] = ("10.90.0.1", "10.90.0.2")

    def run(
        self, node: int, command: Command, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node to its end, its output captured."""
        process = self.start(node, command)
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
            raise AssertionError(f"no end after {timeout:.0f} s:\n{output}\n{errors}") from error
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def start(self, node: int, command: Command) -> subprocess.Popen[str]:
        """Start a command on a node, as the leader of a process group of its own."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespaces[node], *map(str, command)],
            cwd=self.folder,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def cut(self, node: int) -> None:
        """Pull the cable out of a node: from now on the other one only hears silence."""
        _ip("-n", self.namespaces[node], "link", "set", "eth0", "down")

    def mend(self, node: int) -> None:
        """Put the cable back."""
        _ip("-n", self.namespaces[node], "link", "set", "eth0", "up")

    def ssh(self, node: int) -> list[str | Path]:
        """The beginning of a command that the other node runs over ssh on this one."""
        settings = self.folder / "ssh_config"
        return ["ssh", "-F", settings, "-o", "ConnectTimeout=2", self.addresses[node]]

    def deepspeed(self, slots: int, *arguments: str | Path) -> list[str | Path]:
        """The deepspeed launcher for both nodes over pdsh, to be run on node 0."""
        hostfile = self.folder / "hostfile"
        lines = [f"{address} slots={slots}\n" for address in self.addresses]
        hostfile.write_text("".join(lines))
        launcher = Path(sys.executable).with_name("deepspeed")
        options = ["--hostfile", hostfile, "--launcher", "pdsh", "--no_ssh_check"]
        return [launcher, *options, "--master_addr", self.addresses[0], *arguments]

    def processes(self, node: int) -> list[int]:
        """Ids of all processes that run on a node."""
        listed = _ip("netns", "pids", self.namespaces[node]).stdout
        return [int(number) for number in listed.split()]

    def _environment(self) -> Mapping[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        }
        return {
            **inherited,
            "PATH": _PATH,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PDSH_SSH_ARGS_APPEND": f"-F {self.folder / 'ssh_config'}",
        }


def reason_against() -> str | None:
    """Why two nodes cannot be made here, or None."""
    for program, package in _PROGRAMS.items():
        if shutil.which(program, path=_PATH) is None:
            return f"{program} is not installed (Debian package {package})"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"nuwa{os.getpid()}probe"
    try:
        _ip("netns", "add", probe)
        try:
            _ip("-n", probe, "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        finally:
            _ip("netns", "del", probe)
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted here: {error.stderr.strip()}"
    return None


@contextmanager
def two_nodes(folder: Path) -> Iterator[TwoNodes]:
    """Two nodes that know each other by ssh; keys, settings and logs lie in `folder`."""
    name = f"nuwa{os.getpid()}-{next(_NUMBERS)}"
    nodes = TwoNodes(folder, (f"{name}a", f"{name}b"))
    made_empty = not _SSHD_EMPTY.exists()
    daemons: list[subprocess.Popen[str]] = []
    try:
        _connect(nodes)
        _write_settings(nodes)
        _SSHD_EMPTY.mkdir(mode=0o755, exist_ok=True)
        sshd = shutil.which("sshd", path=_PATH)
        assert sshd is not None
        for node in (0, 1):
            log = str(folder / f"sshd-{node}.log")
            daemons.append(
                nodes.start(node, [sshd, "-D", "-E", log, "-f", folder / f"sshd_config-{node}"])
            )
        _await_ssh(nodes)
        yield nodes
    finally:
        _take_down(nodes)
        for daemon in daemons:
            daemon.communicate()
        if made_empty:
            with suppress(OSError):
                _SSHD_EMPTY.rmdir()


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": _PATH}
    return subprocess.run(
        ["ip", *arguments], env=environment, check=True, capture_output=True, text=True
    )


def _connect(nodes: TwoNodes) -> None:
    first, second = nodes.namespaces
    for name in nodes.namespaces:
        _ip("netns", "add", name)
    # The cable is laid inside the namespaces and so vanishes with them.
    _ip(
        *("link", "add", "eth0", "netns", first),
        *("type", "veth", "peer", "name", "eth0", "netns", second),
    )
    for name, address in zip(nodes.namespaces, nodes.addresses, strict=True):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")


def _write_settings(nodes: TwoNodes) -> None:
    """Throw-away keys, the settings of ssh and sshd, and what DeepSpeed hands to other nodes."""
    folder = nodes.folder
    for key in ("key", "host_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True
        )
    for node, address in enumerate(nodes.addresses):
        settings = [
            f"ListenAddress {address}:{_PORT}",
            f"HostKey {folder / 'host_key'}",
            f"AuthorizedKeysFile {folder / 'key.pub'}",
            f"PidFile {folder / f'sshd-{node}.pid'}",
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "UsePAM no",
            # The folder of a test belongs to a group that others may write to.
            "StrictModes no",
        ]
        (folder / f"sshd_config-{node}").write_text("\n".join(settings) + "\n")
    client = [
        "Host *",
        f"  Port {_PORT}",
        f"  IdentityFile {folder / 'key'}",
        "  IdentitiesOnly yes",
        "  BatchMode yes",
        "  StrictHostKeyChecking no",
        "  UserKnownHostsFile /dev/null",
        "  LogLevel ERROR",
    ]
    (folder / "ssh_config").write_text("\n".join(client) + "\n")
    reaching = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    lines = [f"{name}={value}\n" for name, value in reaching.items()]
    (folder / ".deepspeed_env").write_text("".join(lines))


def _await_ssh(nodes: TwoNodes) -> None:
    end = time.monotonic() + _SSHD_SECONDS
    for node, address in enumerate(nodes.addresses):
        while True:
            done = nodes.run(0, [*nodes.ssh(node), "true"], 30)
            if done.returncode == 0:
                break
            if time.monotonic() > end:
                logs = [path.read_text() for path in sorted(nodes.folder.glob("sshd-*.log"))]
                raise RuntimeError(f"ssh to {address} failed: {done.stderr}{''.join(logs)}")
            time.sleep(0.2)


def _take_down(nodes: TwoNodes) -> None:
    """End every process of the nodes, and take the namespaces away with their cable."""
    for node, name in enumerate(nodes.namespaces):
        with suppress(subprocess.CalledProcessError):
            while left := nodes.processes(node):
                for process in left:
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                time.sleep(0.05)
            _ip("netns", "del", name)
