"""Who has memory besides chunks is asked for it in turn, and comes and goes by itself."""

from __future__ import annotations

from offload.tenants import Relief, Tenants


def of(asked: list[tuple[str, bool]], name: str, gives: bool) -> Relief:
    def relief(desperate: bool) -> bool:
        asked.append((name, desperate))
        return gives

    return relief


def test_they_are_asked_in_turn_until_one_gives() -> None:
    asked: list[tuple[str, bool]] = []
    tenants = Tenants()
    assert not tenants.relieve(True)
    for name, gives in (("poor", False), ("rich", True), ("late", True)):
        tenants.join(of(asked, name, gives))
    assert tenants.relieve(False)
    assert asked == [("poor", False), ("rich", False)]


def test_who_leaves_takes_nobody_along() -> None:
    asked: list[tuple[str, bool]] = []
    tenants = Tenants()
    first, second = of(asked, "first", True), of(asked, "second", True)
    tenants.join(first)
    tenants.join(second)
    tenants.leave(first)
    assert tenants.relieve(True)
    assert asked == [("second", True)]
    tenants.leave(second)
    assert not tenants.relieve(True)
