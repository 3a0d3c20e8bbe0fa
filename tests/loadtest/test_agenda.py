"""Virtual time: order, ties, and alarms that move."""

from loadtest.agenda import Agenda, Alarm


def drain(agenda: Agenda) -> None:
    while agenda.next_at is not None:
        agenda.step()


def test_things_happen_in_order_and_equal_instants_as_they_were_noted() -> None:
    agenda, seen = Agenda(), []
    for at, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        agenda.note(at, lambda now, name=name: seen.append((now, name)))
    drain(agenda)
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c")]


def test_an_alarm_rings_once_where_it_was_moved_to() -> None:
    agenda, rung = Agenda(), []
    alarm = Alarm(agenda, rung.append)
    for at in (5.0, 3.0, 5.0, 4.0, 5.0):
        alarm.set(at, now=0.0)
    drain(agenda)
    assert rung == [5.0]


def test_an_alarm_set_to_the_past_rings_now_and_one_set_to_none_never() -> None:
    agenda, rung = Agenda(), []
    Alarm(agenda, rung.append).set(1.0, now=2.0)
    silent = Alarm(agenda, rung.append)
    silent.set(3.0, now=2.0)
    silent.set(None, now=2.0)
    drain(agenda)
    assert rung == [2.0]
