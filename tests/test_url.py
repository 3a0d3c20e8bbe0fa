import pytest

from gateway.core.errors import ConfigError
from gateway.url import parse_address


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("http://gpu-1", "http://gpu-1:80"),
        ("https://gpu-1", "https://gpu-1:443"),
        ("HTTP://GPU_1.example:8000/", "http://gpu_1.example:8000"),
        ("http://[2001:DB8:0::1]:8000", "http://[2001:db8::1]:8000"),
        ("dns://pods.svc:8000", "dns://pods.svc:8000"),
    ],
)
def test_spellings_of_one_address_become_one(url, normal):
    assert parse_address(url, "url").url == normal
    assert parse_address(normal, "url").url == normal


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "expected http://host:port"),
        ("gpu:8000", "expected http://host:port"),
        ("ftp://gpu", "expected http://host:port"),
        ("http://", "expected a host name"),
        ("http://-gpu", "expected a host name"),
        ("http://a%20b", "expected a host name"),
        ("http://gpu:0", "expected a port"),
        ("http://gpu:65536", "not a URL"),
        ("http://gpu:80a", "not a URL"),
        ("dns://gpu", "expected a port"),
        ("http://gpu/v1", "without the path /v1"),
        ("http://gpu?x=1", "without ? or #"),
        ("http://gpu#x", "without ? or #"),
        ("http://gp u", "no spaces"),
        ("http://gpu\n", "no spaces"),
        ("http://gpü", "xn--"),
        ("http://[::1", "not a URL"),
        ("http://[fe80::1%eth0]:1", "zone"),
        ("http://[v1.x]:1", "not an IPv6 address"),
    ],
)
def test_what_is_not_an_engines_root_is_refused_with_the_reason(url, reason):
    with pytest.raises(ConfigError, match=r"^engines\[0\]\.url: ") as caught:
        parse_address(url, "engines[0].url")
    assert reason in caught.value.message


@pytest.mark.parametrize("url", ["http://me:hunter2@gpu", "http://me:hunter2/x@gpu", "hunter2@gpu", "http://@gpu"])
def test_a_password_is_refused_without_repeating_it(url):
    with pytest.raises(ConfigError, match="use api_key") as caught:
        parse_address(url, "url")
    assert "hunter2" not in caught.value.message
