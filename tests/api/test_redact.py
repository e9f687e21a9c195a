"""Secrets in a text are redacted, and other text is not."""

from __future__ import annotations

import pytest

from finetune_api.redact import MARK, is_credential, redact

KEY = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzeXN0ZW0ifQ.c2lnbmF0dXJl"
SECRETS = {
    "hf_" + "a" * 34: "401 Client Error for token {}",
    "AKIAIOSFODNN7EXAMPLE": "InvalidAccessKeyId: {} does not exist",
    "ASIAIOSFODNN7EXAMPLE": "key {}",
    KEY: "AWS_SECRET_ACCESS_KEY={}",
    KEY[:20]: "{{'aws_secret_access_key': '{}', 'region': 'x'}}",
    "hunter2hunter2": "connect(password='{}')",
    "user:p@ss:w0rd": "https://{}@example.org/x",
    ":s3cr3t-value": "postgresql://{}@db/x",
    "abcdefgh12345678": "Authorization: Bearer {}",
    "dXNlcjpwYXNzd29yZA==": "Authorization: Basic {}",
    JWT: "cannot use {}",
    "0123456789abcdef": "GET /b/k?X-Amz-Signature={}&x=1",
    "FwoGZXIvYXdzEJr": "X-Amz-Security-Token={}",
    "github_pat_11ABCDEFG0abcdefghij": "fatal: {}",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----": "the key is\n{}\nand no more",
    "-----BEGIN PRIVATE KEY-----\nMIIEcut": "torn off: {}",
    "Eby8vdM02xNOcqFlq==": "AccountName=x;AccountKey={};EndpointSuffix=y",
    "Endpoint=sb://x": "AZURE_STORAGE_CONNECTION_STRING={}",
}
PLAIN = [
    "tokens: 123456 of 7890123, tokens_per_second=12345.6",
    "tokenizer: expected a directory, eos_token='<|endoftext|>', pad_token_id=151643",
    "KeyError: 'learning_rate'",
    "s3://bucket/path/checkpoint-12@v1 and pvc://claim/a:b",
    "hub: Qwen/Qwen3-0.6B at https://huggingface.co:443/models",
    "the bearer of news",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_goes_and_the_rest_stays(secret: str) -> None:
    before, _, after = SECRETS[secret].format("\0").partition("\0")
    assert redact(SECRETS[secret].format(secret), {}) == f"{before}{MARK}{after}"


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_none_stays(text: str) -> None:
    assert redact(text, {}) == text


def test_values_of_variables_that_are_named_like_secrets() -> None:
    environment = {"HF_TOKEN": "a-token-value", "WANDB_API_KEY": "another", "TOKEN_FILE": "/etc/token", "A_TOKEN": "x"}
    assert redact("a-token-value another /etc/token x", environment) == f"{MARK} {MARK} /etc/token x"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("HF_TOKEN", "abcdef123456", True),
        ("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE", True),
        ("WANDB_API_KEY", "0123456789", True),
        ("ANYTHING", "hf_" + "a" * 30, True),
        ("HTTPS_PROXY", "http://user:password@proxy:3128", True),
        ("HTTPS_PROXY", "http://proxy:3128", False),
        ("GOOGLE_APPLICATION_CREDENTIALS", "/etc/gcp/key.json", False),
        ("MAX_TOKENS", "1048576", False),
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("NCCL_SOCKET_IFNAME", "eth0,eth1,eth2", False),
    ],
)
def test_credentials_among_variables(name: str, value: str, expected: bool) -> None:
    assert is_credential(name, value) is expected
