"""One DynamoDB table under `dynamodb.py`: its items, its conditional writes, and how they fail."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Literal, cast

from voxgate.errors import Overloaded

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from mypy_boto3_dynamodb.client import DynamoDBClient
    from mypy_boto3_dynamodb.type_defs import (
        AttributeValueTypeDef,
        KeysAndAttributesUnionTypeDef,
        TransactWriteItemTypeDef,
    )

Item = dict[str, Any]
Returns = Literal["ALL_NEW", "ALL_OLD"]
Verb = Literal["Put", "Update", "Delete", "ConditionCheck"]
_TRIES = 30
_BUSY = {
    *("TransactionConflict", "TransactionConflictException"),
    *("ThrottlingError", "ThrottlingException", "RequestLimitExceeded"),
    *("ProvisionedThroughputExceeded", "ProvisionedThroughputExceededException"),
}


class Table:
    """Blocking calls; `Failed` is what a write raises that a condition or a collision stopped."""

    def __init__(self, name: str, client: DynamoDBClient | None) -> None:
        self.name = name
        self._client = client or new_client()

    def get(self, pk: str, sk: str) -> Item | None:
        answer = self._client.get_item(TableName=self.name, Key=key_of(pk, sk), ConsistentRead=True)
        return loaded(answer["Item"]) if "Item" in answer else None

    def get_all(self, wanted: Sequence[tuple[str, str]]) -> list[Item]:
        found: list[Item] = []
        for start in range(0, len(wanted), 100):
            keys = [key_of(*key) for key in wanted[start : start + 100]]
            left: Mapping[str, KeysAndAttributesUnionTypeDef] = {self.name: {"Keys": keys, "ConsistentRead": True}}
            for _ in tries():
                answer = self._client.batch_get_item(RequestItems=left)
                found += map(loaded, answer["Responses"].get(self.name, ()))
                left = answer["UnprocessedKeys"]
                if not left:
                    break
            else:
                raise overloaded()
        return found

    def query(self, pk: str, low: str = " ", high: str = "~") -> Iterator[Item]:
        more: dict[str, Any] = {}
        while True:
            page = self._client.query(
                TableName=self.name,
                KeyConditionExpression="pk = :pk AND sk BETWEEN :low AND :high",
                ExpressionAttributeValues={":pk": dump(pk), ":low": dump(low), ":high": dump(high)},
                ConsistentRead=True,
                **more,
            )
            yield from map(loaded, page["Items"])
            if "LastEvaluatedKey" not in page:
                return
            more = {"ExclusiveStartKey": page["LastEvaluatedKey"]}

    # Writing.

    def commit(self, *writes: Write, returns: Returns = "ALL_NEW") -> Item:
        """What no other branch can help: the same once more, as long as it only collides."""
        for _ in tries():
            try:
                return self.once(*writes, returns=returns)
            except Failed as failed:
                if not failed.busy:
                    raise
        raise overloaded()

    def once(self, *writes: Write, returns: Returns = "ALL_NEW") -> Item:
        """One update, which returns the item, or a transaction, which returns nothing.

        Where the answer was lost, the same is sent once more: every write of ours either finds that
        it was done, by its condition, or does the same again without harm.
        """
        from botocore.exceptions import HTTPClientError

        try:
            return self._send(writes, returns)
        except HTTPClientError:
            return self._send(writes, returns)

    def _send(self, writes: Sequence[Write], returns: Returns) -> Item:
        try:
            if len(writes) == 1 and isinstance(writes[0], Update):
                answer = self._client.update_item(**writes[0].rendered(self.name), ReturnValues=returns)
                return loaded(answer.get("Attributes", {}))
            items = [{write.verb: write.rendered(self.name)} for write in writes]
            self._client.transact_write_items(TransactItems=cast("list[TransactWriteItemTypeDef]", items))
        except self._client.exceptions.ClientError as error:
            raise Failed(error) from error
        return {}


class Failed(Exception):
    """A write that did not happen: for each of its parts why not, and the item that was there."""

    def __init__(self, error: ClientError) -> None:
        """Raises again what is none of this."""
        said = cast("dict[str, Any]", error.response)
        self._reasons = said.get("CancellationReasons") or [{**said["Error"], "Item": said.get("Item")}]
        super().__init__(", ".join(reason.get("Code", "None") for reason in self._reasons))
        failed = any(self.at(index) for index in range(len(self._reasons)))
        self.busy = not failed and any(reason.get("Code") in _BUSY for reason in self._reasons)
        if not failed and not self.busy:
            raise error

    def at(self, index: int) -> bool:
        return self._reasons[index].get("Code") in ("ConditionalCheckFailed", "ConditionalCheckFailedException")

    def item(self, index: int) -> Item | None:
        item = self._reasons[index].get("Item") if self.at(index) else None
        return loaded(item) if item else None


class Write:
    """One write: a Put where there is an item, else of what is there. With `exists`, on the condition
    that the item does or does not. All names go by placeholders: some are reserved words, like
    `free`, and most have a `#` in them."""

    def __init__(self, verb: Verb, pk: str, sk: str, item: Item | None = None, *, exists: bool | None = None) -> None:
        self.verb = verb
        key = {"pk": pk, "sk": sk}
        self._content = {"Key": dump(key)["M"]} if item is None else {"Item": dump(key | item)["M"]}
        self._names: dict[str, str] = {}
        self._values: dict[str, AttributeValueTypeDef] = {}
        self._conditions: list[str] = []
        if exists is not None:
            self.where(f"attribute_{'exists' if exists else 'not_exists'}({self.name('pk')})")

    def name(self, attribute: str) -> str:
        return self._names.setdefault(attribute, f"#n{len(self._names)}")

    def value(self, value: object) -> str:
        self._values[name := f":v{len(self._values)}"] = dump(value)
        return name

    def where(self, condition: str) -> None:
        self._conditions.append(condition)

    def rendered(self, table: str) -> dict[str, Any]:
        write: dict[str, Any] = {"TableName": table, **self._content}
        if self._conditions:
            write["ConditionExpression"] = " AND ".join(self._conditions)
            write["ReturnValuesOnConditionCheckFailure"] = "ALL_OLD"
        if self._names:
            write["ExpressionAttributeNames"] = {name: attribute for attribute, name in self._names.items()}
        if self._values:
            write["ExpressionAttributeValues"] = self._values
        return write


class Update(Write):
    """Put together clause by clause."""

    def __init__(self, pk: str, sk: str, *, exists: bool | None = True) -> None:
        super().__init__("Update", pk, sk, exists=exists)
        self._sets: dict[str, Any] = {}
        self._sums: dict[str, int] = {}
        self._clauses: dict[str, list[str]] = {"SET": [], "ADD": [], "REMOVE": [], "DELETE": []}

    def set(self, attribute: str, value: object, *, once: bool = False) -> None:
        """What is None is removed."""
        if value is None:
            self.remove(attribute)
            return
        name, new = self.name(attribute), self.value(value)
        self._sets[attribute] = value
        self._clauses["SET"].append(f"{name} = if_not_exists({name}, {new})" if once else f"{name} = {new}")

    def add(self, attribute: str, number: int) -> None:
        """Once for each attribute at most."""
        self._sums[attribute] = number
        self._clauses["ADD"].append(f"{self.name(attribute)} {self.value(number)}")

    def remove(self, attribute: str) -> None:
        self._clauses["REMOVE"].append(self.name(attribute))

    def include(self, attribute: str, member: str) -> None:
        self._clauses["ADD"].append(f"{self.name(attribute)} {self.value({member})}")

    def exclude(self, attribute: str, members: Set[str]) -> None:
        self._clauses["DELETE"].append(f"{self.name(attribute)} {self.value(members)}")

    def reckoned(self, known: Mapping[str, int]) -> Item:
        """What it makes of the numbers that are known."""
        return {**known, **self._sets, **{name: known.get(name, 0) + number for name, number in self._sums.items()}}

    def rendered(self, table: str) -> dict[str, Any]:
        parts = [f"{verb} {', '.join(parts)}" for verb, parts in self._clauses.items() if parts]
        return {**super().rendered(table), "UpdateExpression": " ".join(parts)}


def new_client(region: str = "", profile: str = "") -> DynamoDBClient:
    """Region and credentials are found as AWS's own tools find them, unless they are named."""
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "max_attempts": 4}, connect_timeout=2, read_timeout=5, max_pool_connections=32
    )
    session = boto3.session.Session(region_name=region or None, profile_name=profile or None)
    return session.client("dynamodb", config=config)


def tries() -> Iterator[int]:
    """Time for whoever is in the way: none at first, then up to a tenth of a second each."""
    for attempt in range(_TRIES):
        if attempt >= 2:
            time.sleep(random.uniform(0, min(0.005 * 2**attempt, 0.1)))  # noqa: S311 - spreads load, guards nothing
        yield attempt


def overloaded() -> Overloaded:
    return Overloaded("Too many requests of this account come at once; try again.", retry_after=1)


def key_of(pk: str, sk: str) -> dict[str, AttributeValueTypeDef]:
    return {"pk": {"S": pk}, "sk": {"S": sk}}


def dump(value: object) -> AttributeValueTypeDef:
    """As DynamoDB has it. What is None in a mapping is left out."""
    match value:
        case str():
            return {"S": str(value)}
        case int() | float():
            return {"N": repr(value)}
        case bytes():
            return {"B": value}
        case set():
            return {"SS": sorted(value)}
        case Mapping():
            return {"M": {name: dump(part) for name, part in value.items() if part is not None}}
        case _:
            return {"L": [dump(part) for part in cast("Iterable[object]", value)]}


def _load(value: AttributeValueTypeDef) -> Any:
    ((kind, content),) = cast("dict[str, Any]", value).items()
    match kind:
        case "N":
            return int(content) if content.lstrip("-").isdigit() else float(content)
        case "SS":
            return set(content)
        case "M":
            return loaded(content)
        case "L":
            return [_load(part) for part in content]
        case _:
            return content


def loaded(item: Mapping[str, AttributeValueTypeDef]) -> Item:
    return {name: _load(value) for name, value in item.items()}
