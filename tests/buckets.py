"""Object storage on loopback: moto's server in this process, and the variables that name it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

KEY, SECRET = "AKIAVERYSECRETKEYID", "very/secret/access/key"


@dataclass
class Store:
    """A running service; `client` is one of its own for tests to look into buckets."""

    client: Any
    variables: dict[str, str]

    def content(self, bucket: str) -> dict[str, bytes]:
        """The objects of a bucket by key."""
        found = self.client.list_objects_v2(Bucket=bucket).get("Contents", [])
        return {
            each["Key"]: self.client.get_object(Bucket=bucket, Key=each["Key"])["Body"].read()
            for each in found
        }


@contextmanager
def serve() -> Iterator[Store]:
    """Run a service until the block ends. Skips the test if moto is not installed."""
    why = "needs moto: make setup-test"
    server = pytest.importorskip("moto.server", reason=why)
    boto3 = pytest.importorskip("boto3", reason=why)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        variables = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }
        client = boto3.client(
            "s3",
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
        )
        yield Store(client, variables)
    finally:
        running.stop()
