"""Keys, region and endpoint of the profile in ~/.aws that AWS's own tools would take (AWS_PROFILE, else `default`)."""

from __future__ import annotations

import configparser
import os
from pathlib import Path
from typing import TYPE_CHECKING

from polytrope.pipeline.errors import UserError

if TYPE_CHECKING:
    from obstore.auth.boto3 import Boto3CredentialProvider

_SETTINGS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}


def profile_settings() -> tuple[dict[str, str], Boto3CredentialProvider | None]:
    """What the variables do not say already: settings by `obstore`'s names, and who gets credentials that expire.

    Raises:
        UserError: AWS_PROFILE names a profile without keys, and boto3, which could ask for some, is not installed.
    """
    found = {_SETTINGS[name]: value for name, value in _read_profile().items() if name in _SETTINGS}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # these belong together
        found = {name: value for name, value in found.items() if name in ("region", "endpoint")}
    if "AWS_REGION" in os.environ or "AWS_DEFAULT_REGION" in os.environ:
        found["region"] = os.environ.get("AWS_REGION") or os.environ["AWS_DEFAULT_REGION"]
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        found["endpoint"] = endpoint
    profile = os.environ.get("AWS_PROFILE")
    if profile is None or "AWS_ACCESS_KEY_ID" in os.environ or "access_key_id" in found:
        return found, None
    try:  # single sign-on, a role, a program: AWS's own client knows how
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise UserError(
            f"AWS_PROFILE: the profile `{profile}` has no aws_access_key_id",
            'install boto3, or `eval "$(aws configure export-credentials --format env)"`',
        ) from None
    return found, Boto3CredentialProvider()


def _read_profile() -> dict[str, str]:
    """Both files, that with the keys last."""
    profile = os.environ.get("AWS_PROFILE", "default")
    home = Path.home() / ".aws"
    files = {
        os.environ.get("AWS_CONFIG_FILE", home / "config"): (
            "default" if profile == "default" else f"profile {profile}"
        ),
        os.environ.get("AWS_SHARED_CREDENTIALS_FILE", home / "credentials"): profile,
    }
    found: dict[str, str] = {}
    for file, section in files.items():
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(file)
        except (configparser.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
        if parser.has_section(section):
            found.update(parser.items(section))
    return found
