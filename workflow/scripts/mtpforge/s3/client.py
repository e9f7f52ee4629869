"""A client of S3 or of a service like it: boto3, which `make s3` installs.

boto3 finds the credentials, the region and the service's address by itself: in AWS_* variables, in
~/.aws, or from the machine. Messages have neither credentials nor what the service says besides an
error's code.
"""

from typing import Any

from mtpforge.errors import ConfigError, printable

TRIES = 6
"""Of each request; boto3 waits in between."""
CONNECT_SECONDS, READ_SECONDS = 20, 120

_CODES = {
    "NoSuchBucket": "no such bucket: create it, or check its name and AWS_ENDPOINT_URL",
    "NoSuchKey": "no such file",
    "404": "no such bucket or file",
    "PreconditionFailed": "changed while it was read: run again",
    "412": "changed while it was read: run again",
    "NoSuchUpload": "another run has finished or ended the same upload",
    "AccessDenied": "access denied: the credentials need the right to list, read and write there",
    "403": "access denied: the credentials need the right to list, read and write there",
    "InvalidAccessKeyId": "the access key is not known there: check AWS_ACCESS_KEY_ID or ~/.aws",
    "SignatureDoesNotMatch": "the secret key is wrong: check AWS_SECRET_ACCESS_KEY or ~/.aws",
    "ExpiredToken": "the credentials have expired: get new ones",
}
_TYPES = {
    "NoCredentialsError": "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "AWS_PROFILE",
    "PartialCredentialsError": "only a part of the credentials is set: set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "EndpointConnectionError": "cannot be reached: check the network and AWS_ENDPOINT_URL",
    "ConnectTimeoutError": "cannot be reached: check the network and AWS_ENDPOINT_URL",
    "ReadTimeoutError": "does not answer: run again later",
    "IncompleteReadError": "ended too early",
    "ResponseStreamingError": "broke off",
}


def connect() -> Any:
    """A client of boto3. Raises ConfigError if boto3 is missing, or refuses its settings."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise ConfigError("s3:// addresses need boto3: run `make s3`") from None
    config = Config(
        retries={"mode": "standard", "total_max_attempts": TRIES},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
    )
    refusals: tuple[type[Exception], ...] = (*failures(), ValueError)
    try:
        return boto3.session.Session().client("s3", config=config)
    except refusals as error:
        raise ConfigError(
            f"boto3 refuses its settings ({type(error).__name__}): check the AWS_* variables and "
            "~/.aws"
        ) from None


def failures() -> tuple[type[Exception], ...]:
    """Exceptions of a failed request."""
    from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

    return BotoCoreError, ClientError, HTTPClientError


def explain(error: Exception) -> str:
    """Describe a failed request in one line without any secret."""
    code = code_of(error)
    if code:
        return _CODES.get(code, f"the service answers {printable(code)[:100]}")
    name = type(error).__name__
    return _TYPES.get(name, f"boto3 failed ({name}): run again later")


def code_of(error: Exception) -> str:
    """The code of the service's answer; empty if there was none."""
    response = getattr(error, "response", None)
    return str(response["Error"].get("Code", "")) if isinstance(response, dict) else ""
