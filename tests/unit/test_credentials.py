"""Who is calling: keys in headers against a store, and what of it is remembered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.store import START, Clock, sync
from voxgate.accounts import (
    Account,
    Bounds,
    Credential,
    Key,
    RateLimits,
    Scope,
    Status,
    keys,
)
from voxgate.accounts.credentials import Authenticator
from voxgate.accounts.sqlite import SqliteStore
from voxgate.errors import Forbidden, Unauthenticated, VoxgateError

SECRET = keys.generate()
DIGEST = keys.digest(SECRET)
BEARER = {"authorization": f"Bearer {SECRET}"}
LIMITS = RateLimits(100, 200, 3)
TODAY = "2026-11-21"


class Counting(SqliteStore):
    """Notes what it is asked."""

    def __init__(self, path: Path, clock: Clock) -> None:
        super().__init__(path, clock=clock)
        self.looked_up: list[bytes] = []
        self.marked: list[tuple[str, str]] = []

    async def find_credential(self, digest: bytes) -> Credential | None:
        self.looked_up.append(digest)
        return await super().find_credential(digest)

    async def mark_used(self, key: Key, day: str) -> None:
        self.marked.append((key.id, day))
        await super().mark_used(key, day)


class Door:
    """An authenticator of a store in which there are one account and one key."""

    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        self.store = Counting(path, self.clock)
        self.authenticate = self.another()
        self.account: Account
        self.key: Key

    def another(self, key_limits: RateLimits = RateLimits()) -> Authenticator:  # noqa: B008
        return Authenticator(self.store, account_limits=LIMITS, key_limits=key_limits, clock=self.clock)

    async def furnish(self, **known: object) -> None:
        self.account = await self.store.create_account("acme")
        self.key = dataclasses.replace(Key(id="key_1", account_id=self.account.id, created=1), **known)  # type: ignore[arg-type]
        await self.store.create_key(self.key, DIGEST)

    async def refused(self, headers: dict[str, str], scope: Scope | None = None, also: str = "") -> VoxgateError:
        with pytest.raises(VoxgateError) as caught:
            await self.authenticate(headers, scope, also=also)
        told = f"{caught.value!r} {caught.value} {caught.value.envelope()} {caught.value.headers}"
        for secret in (SECRET, DIGEST.hex(), repr(DIGEST)):
            assert secret not in told
        return caught.value


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    door = Door(tmp_path / "voxgate.sqlite")
    yield door
    sync(door.store.close)()


@sync
async def test_a_key_lets_its_account_in_by_the_accounts_bounds(door: Door) -> None:
    await door.furnish(models=("a", "b"))
    caller = await door.authenticate(BEARER, Scope.TRANSCRIBE)
    assert (caller.account_id, caller.key_id, caller.models) == (door.account.id, "key_1", ("a", "b"))
    assert caller.bounds == (Bounds(door.account.id, LIMITS),)
    ticket = caller.ticket("req")
    assert (ticket.request_id, ticket.account_id, ticket.key_id) == ("req", door.account.id, "key_1")
    assert ticket.bounds == caller.bounds
    assert caller.may_use("x", "b")
    assert not caller.may_use("x")


@pytest.mark.parametrize(("models", "may"), [(None, True), ((), False), (("other",), False)])
@sync
async def test_a_key_may_use_the_models_it_names_and_without_a_list_any(
    door: Door, models: tuple[str, ...] | None, may: bool
) -> None:
    await door.furnish(models=models)
    assert (await door.authenticate(BEARER)).may_use("whisper-1") is may


@sync
async def test_what_account_and_key_say_goes_before_the_defaults(door: Door) -> None:
    await door.furnish(limits=RateLimits(None, 7, None), budget=5)
    await door.store.change_account(dataclasses.replace(door.account, limits=RateLimits(1, None, 0), budget=9))
    authenticate = door.another(RateLimits(11, 12, None))
    assert (await authenticate(BEARER)).bounds == (
        Bounds(door.account.id, RateLimits(1, 200, 0), 9),
        Bounds("key_1", RateLimits(11, 7, None), 5),
    )


@pytest.mark.parametrize("known", [{"budget": 0}, {"limits": RateLimits(None, None, 1)}])
@sync
async def test_a_key_has_bounds_of_its_own_where_it_is_limited_at_all(door: Door, known: dict[str, object]) -> None:
    await door.furnish(**known)
    account, key = (await door.authenticate(BEARER)).bounds
    assert (account.id, key.id) == (door.account.id, "key_1")
    assert (key.limits, key.budget) == (known.get("limits", RateLimits()), known.get("budget"))


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "didn't provide"),
        ({"authorization": ""}, "didn't provide"),
        ({"authorization": "Bearer"}, "didn't provide"),
        ({"authorization": "Bearer   "}, "didn't provide"),
        ({"authorization": f"Basic {SECRET}"}, "must be 'Bearer KEY'"),
        ({"authorization": SECRET}, "didn't provide"),
        ({"authorization": f"Bearer {SECRET[:-1]}"}, "cut off or mistyped"),
        ({"authorization": f"Bearer {SECRET}x"}, "cut off or mistyped"),
        ({"authorization": f"Bearer {SECRET} {SECRET}"}, "cut off or mistyped"),
        ({"authorization": "Bearer é"}, "cut off or mistyped"),
        ({"x-api-key": SECRET}, "didn't provide"),
    ],
)
@sync
async def test_what_is_no_key_is_told_so_and_never_looked_up(door: Door, headers: dict[str, str], message: str) -> None:
    await door.furnish()
    error = await door.refused(headers)
    assert isinstance(error, Unauthenticated)
    assert message in error.message
    assert (error.status, error.headers) == (401, {"www-authenticate": 'Bearer realm="voxgate"'})
    assert door.store.looked_up == []


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "  BEARER   {}  "])
@sync
async def test_the_scheme_is_in_any_case_with_any_space_around_the_key(door: Door, form: str) -> None:
    await door.furnish()
    assert (await door.authenticate({"authorization": form.format(SECRET)})).key_id == "key_1"


@sync
async def test_unknown_revoked_and_expired_are_one_answer(door: Door) -> None:
    await door.furnish(expires=int(START) + 100)
    unknown = await door.refused({"authorization": f"Bearer {keys.generate()}"})
    assert (await door.authenticate(BEARER)).key_id == "key_1"
    door.clock.advance(99.999)
    assert (await door.authenticate(BEARER)).key_id == "key_1"
    door.clock.advance(0.001)
    expired = await door.refused(BEARER)
    sharp = Authenticator(door.store, account_limits=LIMITS, key_limits=LIMITS, clock=lambda: START + 100)
    with pytest.raises(Unauthenticated):
        await sharp(BEARER)
    other = keys.generate()
    await door.store.create_key(dataclasses.replace(door.key, id="key_2", expires=None), keys.digest(other))
    await door.store.revoke_key("key_2")
    revoked = await door.refused({"authorization": f"Bearer {other}"})
    answers = {(type(error), error.message, tuple(error.headers)) for error in (unknown, expired, revoked)}
    assert len(answers) == 1
    assert isinstance(expired, Unauthenticated)


@sync
async def test_a_suspended_account_is_told_so_unless_its_key_is_revoked(door: Door) -> None:
    await door.furnish()
    await door.store.change_account(dataclasses.replace(door.account, status=Status.SUSPENDED))
    error = await door.refused(BEARER)
    assert isinstance(error, Forbidden)
    assert (error.status, error.code) == (403, "account_suspended")
    assert door.store.marked == []
    await door.store.revoke_key("key_1")
    door.clock.advance(door.store.lookup_seconds)
    assert isinstance(await door.refused(BEARER), Unauthenticated)


@pytest.mark.parametrize(
    ("scopes", "allowed"),
    [
        ({Scope.TRANSCRIBE}, {Scope.TRANSCRIBE, None}),
        ({Scope.TRANSCRIBE, Scope.USAGE}, {Scope.TRANSCRIBE, Scope.USAGE, None}),
        ({Scope.ADMIN}, {*Scope, None}),
        (set(), {None}),
    ],
)
@sync
async def test_a_key_is_for_its_scopes_and_an_admins_for_all(
    door: Door, scopes: set[Scope], allowed: set[Scope | None]
) -> None:
    await door.furnish(scopes=frozenset(scopes))
    for scope in (*Scope, None):
        if scope in allowed:
            assert (await door.authenticate(BEARER, scope)).key_id == "key_1"
        else:
            error = await door.refused(BEARER, scope)
            assert isinstance(error, Forbidden)
            assert error.code == "permission_denied"
            assert f"'{scope}'" in error.message


@sync
async def test_another_header_carries_the_key_where_it_may_and_authorization_is_absent(door: Door) -> None:
    await door.furnish()
    assert (await door.authenticate({"x-api-key": f" {SECRET} "}, also="x-api-key")).key_id == "key_1"
    assert (await door.authenticate(BEARER, also="x-api-key")).key_id == "key_1"
    assert (await door.authenticate(BEARER | {"x-api-key": "wrong"}, also="x-api-key")).key_id == "key_1"
    for headers, also in (
        ({"x-api-key": SECRET}, ""),
        ({"x-api-key": SECRET}, "x-other"),
        ({"x-api-key": ""}, "x-api-key"),
        ({}, "x-api-key"),
        ({"x-api-key": f"Bearer {SECRET}"}, "x-api-key"),
        ({"x-api-key": SECRET, "authorization": f"Basic {SECRET}"}, "x-api-key"),
        ({"x-api-key": SECRET, "authorization": f"Bearer {keys.generate()}"}, "x-api-key"),
    ):
        assert isinstance(await door.refused(headers, also=also), Unauthenticated)


# What is remembered.


@sync
async def test_a_known_key_is_looked_up_once_in_its_time_and_a_revocation_seen_within_it(door: Door) -> None:
    await door.furnish(last_used=TODAY)
    for _ in range(3):
        await door.authenticate(BEARER)
    assert door.store.looked_up == [DIGEST]
    await door.store.revoke_key("key_1")
    door.clock.advance(door.store.lookup_seconds - 0.001)
    await door.authenticate(BEARER)
    assert door.store.looked_up == [DIGEST]
    door.clock.advance(0.001)
    await door.refused(BEARER)
    assert door.store.looked_up == [DIGEST, DIGEST]


@sync
async def test_noting_the_day_of_use_does_not_put_off_a_revocation(door: Door) -> None:
    await door.furnish(last_used=TODAY)
    door.clock.advance(43_200 - 1)  # a second before midnight
    await door.authenticate(BEARER)
    await door.store.revoke_key("key_1")
    door.clock.advance(door.store.lookup_seconds - 0.5)
    await door.authenticate(BEARER)  # the first of the next day
    door.clock.advance(0.5)
    await door.refused(BEARER)


@sync
async def test_a_suspension_and_what_else_changes_is_seen_within_the_same_time(door: Door) -> None:
    await door.furnish()
    await door.authenticate(BEARER)
    await door.store.change_account(dataclasses.replace(door.account, budget=7))
    door.clock.advance(door.store.lookup_seconds)
    assert (await door.authenticate(BEARER)).bounds[0].budget == 7
    await door.store.change_account(dataclasses.replace(door.account, status=Status.SUSPENDED))
    door.clock.advance(door.store.lookup_seconds)
    assert isinstance(await door.refused(BEARER), Forbidden)


@sync
async def test_an_unknown_key_is_remembered_for_a_while_and_then_looked_up_again(door: Door) -> None:
    for _ in range(5):
        await door.refused(BEARER)
    assert door.store.looked_up == [DIGEST]
    await door.furnish()
    door.clock.advance(9.999)
    await door.refused(BEARER)
    assert door.store.looked_up == [DIGEST]
    door.clock.advance(0.001)
    assert (await door.authenticate(BEARER)).key_id == "key_1"


@sync
async def test_wrong_keys_do_not_push_out_right_ones_and_take_bounded_room(door: Door) -> None:
    await door.furnish()
    await door.authenticate(BEARER)
    door.store.looked_up.clear()
    wrong = [{"authorization": f"Bearer {keys.generate()}"} for _ in range(5000)]
    for headers in wrong:
        with pytest.raises(Unauthenticated):
            await door.authenticate(headers)
    assert len(door.store.looked_up) == 5000
    await door.authenticate(BEARER)
    assert len(door.store.looked_up) == 5000
    await door.refused(wrong[-1])
    assert len(door.store.looked_up) == 5000
    await door.refused(wrong[0])  # forgotten by now
    assert len(door.store.looked_up) == 5001


@sync
async def test_a_key_is_marked_as_used_once_a_day(door: Door) -> None:
    await door.furnish()
    for _ in range(3):
        await door.authenticate(BEARER)
    door.clock.advance(door.store.lookup_seconds)
    await door.authenticate(BEARER)
    await door.another()(BEARER)
    assert door.store.marked == [("key_1", TODAY)]
    assert (await door.store.find_key("key_1")).last_used == TODAY
    door.clock.advance(43_200)
    for _ in range(3):
        await door.authenticate(BEARER)
    assert door.store.marked == [("key_1", TODAY), ("key_1", "2026-11-22")]
    assert (await door.store.find_key("key_1")).last_used == "2026-11-22"


@sync
async def test_who_is_refused_has_not_used_the_key(door: Door) -> None:
    await door.furnish(scopes=frozenset({Scope.USAGE}))
    await door.refused(BEARER, Scope.ADMIN)
    assert door.store.marked == []


@sync
async def test_nothing_that_can_be_logged_has_a_secret_in_it(door: Door) -> None:
    await door.furnish()
    caller = await door.authenticate(BEARER)
    credential = await door.store.find_credential(DIGEST)
    assert credential is not None
    told = f"{credential!r} {credential} {caller!r} {caller.ticket('r')!r} {door.authenticate!r}"
    for secret in (SECRET, SECRET[3:33], DIGEST.hex(), repr(DIGEST), str(DIGEST)):
        assert secret not in told


# Tokens.

TOKEN = keys.generate(keys.TOKEN)
WITH_TOKEN = {"authorization": f"Bearer {TOKEN}"}


@sync
async def test_a_token_lets_in_where_tokens_do_by_its_keys_bounds_and_nowhere_else(door: Door) -> None:
    await door.furnish(models=("a",), budget=5)
    await door.store.create_token(keys.digest(TOKEN), door.key, int(START) + 60)
    for _ in range(2):  # looked up, and remembered
        assert await door.authenticate(WITH_TOKEN, Scope.TRANSCRIBE, tokens=True) == await door.authenticate(BEARER)
        for scope in (Scope.TRANSCRIBE, None):
            error = await door.refused(WITH_TOKEN, scope)
            assert isinstance(error, Unauthenticated)
            assert TOKEN not in f"{error!r} {error.envelope()}"
        assert isinstance(await door.refused({"x-api-key": TOKEN}, also="x-api-key"), Unauthenticated)
    assert (await door.authenticate(BEARER, tokens=True)).key_id == "key_1"


@pytest.mark.parametrize(("own", "seconds"), [(None, 60), (30, 30), (90, 60)])
@sync
async def test_a_token_ends_with_the_earlier_of_its_own_time_and_its_keys(
    door: Door, own: int | None, seconds: int
) -> None:
    await door.furnish(expires=None if own is None else int(START) + own)
    await door.store.create_token(keys.digest(TOKEN), door.key, int(START) + 60)
    door.clock.advance(seconds - 0.001)
    assert (await door.authenticate(WITH_TOKEN, tokens=True)).key_id == "key_1"
    door.clock.advance(0.001)
    with pytest.raises(Unauthenticated) as expired:
        await door.authenticate(WITH_TOKEN, tokens=True)
    with pytest.raises(Unauthenticated) as unknown:
        await door.authenticate({"authorization": f"Bearer {keys.generate(keys.TOKEN)}"}, tokens=True)
    assert expired.value.message == unknown.value.message


@sync
async def test_a_token_ends_with_its_key_and_waits_with_its_account(door: Door) -> None:
    await door.furnish(scopes=frozenset({Scope.TRANSCRIBE}))
    await door.store.create_token(keys.digest(TOKEN), door.key, int(START) + 3600)
    await door.authenticate(WITH_TOKEN, Scope.TRANSCRIBE, tokens=True)
    with pytest.raises(Forbidden):
        await door.authenticate(WITH_TOKEN, Scope.USAGE, tokens=True)
    await door.store.change_account(dataclasses.replace(door.account, status=Status.SUSPENDED))
    door.clock.advance(door.store.lookup_seconds)
    with pytest.raises(Forbidden):
        await door.authenticate(WITH_TOKEN, tokens=True)
    await door.store.change_account(door.account)
    await door.store.revoke_key("key_1")
    door.clock.advance(door.store.lookup_seconds)
    with pytest.raises(Unauthenticated):
        await door.authenticate(WITH_TOKEN, tokens=True)


@pytest.mark.parametrize(
    "wrong",
    [TOKEN[:-1], TOKEN + "x", "vt_" + SECRET[3:], "vg_" + TOKEN[3:], "vt_"],
    ids=["cut", "longer", "key", "called-key", "empty"],
)
@sync
async def test_what_is_no_token_is_never_looked_up(door: Door, wrong: str) -> None:
    await door.furnish()
    with pytest.raises(Unauthenticated, match="cut off or mistyped"):
        await door.authenticate({"authorization": f"Bearer {wrong}"}, tokens=True)
    assert door.store.looked_up == []


@sync
async def test_a_token_marks_its_key_as_used(door: Door) -> None:
    await door.furnish()
    await door.store.create_token(keys.digest(TOKEN), door.key, int(START) + 60)
    for _ in range(3):
        await door.authenticate(WITH_TOKEN, tokens=True)
    assert door.store.marked == [("key_1", TODAY)]
    assert (await door.store.find_key("key_1")).expires is None
