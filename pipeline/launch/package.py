"""What of a working directory travels to a cluster: chosen here, so that it can be listed, and nothing else goes."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from polytrope.pipeline.errors import UserError

LARGEST = 200_000_000  # bytes that are sent; data belongs into a store or a place that the cluster reaches
# Names of files and directories, of any case, and why they stay here.
_LEFT_OUT: dict[str, tuple[str, ...]] = {
    "credentials": (
        ".env", ".env.*", "*.env", ".envrc", ".netrc", ".npmrc", ".pypirc", ".pgpass", ".my.cnf", ".htpasswd", ".ssh",
        ".aws", ".azure", ".gcloud", ".kube", ".docker", ".gnupg", ".git-credentials", "id_rsa*", "id_dsa*",
        "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "credentials",
        "credentials.*", "*credentials.json", "service-account*.json", "service_account*.json", "secrets.*",
        "secrets", "auth_token", "token", ".vault-token", "*client_secret*.json", "kubeconfig", "gcloud", ".boto",
        ".s3cfg", "rclone.conf", ".huggingface", "*.tfstate", "*.tfstate.backup",
    ),
    "databases": ("*.db", "*.sqlite", "*.sqlite3", "*.db-wal", "*.db-shm", "*.dump", "*.mdb"),
    "environments and products": (
        ".git", ".hg", ".svn", ".venv", "venv", "node_modules", "__pycache__", "*.pyc", ".polytrope", "mlruns", "build",
        "dist", "*.egg-info", ".*_cache", ".cache", ".tox", ".nox", ".ipynb_checkpoints", ".ds_store",
    ),
}  # fmt: skip


@dataclass
class Package:
    """Files that travel, relative to `directory`, with their sizes; and what stays, by reason."""

    directory: Path
    files: dict[Path, int] = field(default_factory=dict)
    left_out: dict[str, list[Path]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes that travel."""
        return sum(self.files.values())


def choose_files(directory: Path) -> Package:
    """All files below a directory but for credentials, databases, environments, and what git ignores.

    Raises:
        UserError: more than `LARGEST`, the largest files are named; or git cannot say what it ignores.
    """
    package = Package(directory)

    def unreadable(error: OSError) -> None:
        package.left_out.setdefault("cannot be read", []).append(Path(error.filename).relative_to(directory))

    for current, directories, names in os.walk(directory, onerror=unreadable):
        for name in list(directories):
            path = Path(current, name)
            reason = _reason(name) or ("environments and products" if os.path.exists(path / "pyvenv.cfg") else None)
            if reason is None and path.is_symlink():  # `os.walk` does not follow it
                reason = "links to directories"
            if reason is not None:
                package.left_out.setdefault(reason, []).append(path.relative_to(directory))
                directories.remove(name)
        for name in names:
            path = Path(current, name)
            reason = _reason(name) if path.is_file() else "links to nowhere and special files"
            if reason is None and not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
                reason = "cannot be read"
            if reason is not None:
                package.left_out.setdefault(reason, []).append(path.relative_to(directory))
            else:
                package.files[path.relative_to(directory)] = path.stat().st_size
    for path in _ignored(directory, list(package.files)):
        del package.files[path]
        package.left_out.setdefault("ignored by git", []).append(path)
    if package.size > LARGEST:
        largest = sorted(package.files, key=lambda path: -package.files[path])[:3]
        raise UserError(
            f"{directory} holds {package.size / 1e6:,.0f} MB to send, more than {LARGEST / 1e6:,.0f} MB; the largest: "
            + ", ".join(f"{path} ({package.files[path] / 1e6:,.0f} MB)" for path in largest),
            "keep data where the cluster reaches it, add it to .gitignore, or give a smaller `--working-dir`",
        )
    return package


def refuse_left_out(package: Package, needed: Iterable[Path]) -> None:
    """Raise `UserError` where a file that the run needs would stay here; all lie below the package's directory."""
    reasons = {path: reason for reason, paths in package.left_out.items() for path in paths}
    for file in needed:
        path = file.relative_to(package.directory)
        if path in package.files:
            continue
        reason = next((reasons[place] for place in (path, *path.parents) if place in reasons), "not there")
        raise UserError(
            f"{path} would not be sent ({reason}), and the run needs it",
            "move it, rename it, or take it out of .gitignore; `polytrope submit … --dry-run` lists what is sent",
        )


def copy_files(package: Package, target: Path) -> None:
    """Put the chosen files below an empty directory."""
    for path in package.files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(package.directory / path, target / path)


def _reason(name: str) -> str | None:
    for reason, patterns in _LEFT_OUT.items():
        if any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns):
            return reason
    return None


def _ignored(directory: Path, paths: list[Path]) -> list[Path]:
    """Which of the files git ignores; none outside a repository.

    Raises:
        UserError: git gives no answer in a repository: what it ignores may be secret, and nobody knows what that is.
    """
    way = "mend it: without an answer, files that must stay here could be sent"
    try:
        result = subprocess.run(
            ["git", "-C", str(directory), "check-ignore", "-z", "--stdin"],
            input=b"\0".join(os.fsencode(path) for path in paths),
            capture_output=True,
            timeout=60,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        if any((place / ".git").exists() for place in (directory, *directory.parents)):
            raise UserError(f"git does not say which files of {directory} it ignores: {error}", way) from None
        return []
    if result.returncode not in (0, 1) and b"not a git repository" not in result.stderr:
        reason = result.stderr.decode(errors="replace").strip()
        raise UserError(f"git does not say which files of {directory} it ignores: {reason}", way)
    return [Path(os.fsdecode(name)) for name in result.stdout.split(b"\0") if name]
