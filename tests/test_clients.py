from gateway.clients import Clients


def test_one_address_has_one_number_and_two_have_two() -> None:
    clients = Clients()
    assert clients.number("10.0.0.1") == clients.number("10.0.0.1") != clients.number("10.0.0.2")


def test_a_number_tells_nothing_to_another_process_and_fits_into_a_double() -> None:
    number = Clients().number("10.0.0.1")
    assert number != Clients().number("10.0.0.1")
    assert number is not None
    assert 0 <= number < 2**53


def test_without_an_address_nobody_is_known() -> None:
    assert Clients().number(None) is None
