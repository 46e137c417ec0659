"""One DynamoDB table under `dynamodb.py`: its items, its conditional writes, and how they fail."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Literal, Union, cast

from voxgate.accounts.rules import Bucket
from voxgate.errors import Overloaded

if TYPE_CHECKING:
    from botocore.exceptions import ClientError
    from mypy_boto3_dynamodb.client import DynamoDBClient
    from mypy_boto3_dynamodb.type_defs import (
        AttributeValueTypeDef,
        KeysAndAttributesUnionTypeDef,
        TransactWriteItemTypeDef,
        UpdateTypeDef,
    )

Item = dict[str, Any]
Write = Union["Update", "TransactWriteItemTypeDef"]
_TRIES = 30
_BUSY = {
    *("TransactionConflict", "TransactionConflictException"),
    *("ThrottlingError", "ThrottlingException", "RequestLimitExceeded"),
    *("ProvisionedThroughputExceeded", "ProvisionedThroughputExceededException"),
}


def create_table(client: DynamoDBClient, table: str) -> None:
    """The table as the deployment makes it, for tests and local use."""
    client.create_table(
        TableName=table,
        KeySchema=[{"AttributeName": "pk", "KeyType": "HASH"}, {"AttributeName": "sk", "KeyType": "RANGE"}],
        AttributeDefinitions=[
            {"AttributeName": "pk", "AttributeType": "S"},
            {"AttributeName": "sk", "AttributeType": "S"},
        ],
        BillingMode="PAY_PER_REQUEST",
    )
    client.get_waiter("table_exists").wait(TableName=table)
    client.update_time_to_live(TableName=table, TimeToLiveSpecification={"Enabled": True, "AttributeName": "ttl"})


class Table:
    """Blocking calls; `Failed` is what a write raises that a condition or a collision stopped."""

    def __init__(self, name: str, client: DynamoDBClient | None) -> None:
        self.name = name
        self._client = client or _new_client()

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

    def put(self, pk: str, sk: str, item: Item, *, new: bool = False) -> TransactWriteItemTypeDef:
        write: TransactWriteItemTypeDef = {
            "Put": {"TableName": self.name, "Item": dump({"pk": pk, "sk": sk, **item})["M"]}
        }
        if new:
            write["Put"]["ConditionExpression"] = "attribute_not_exists(pk)"
        return write

    def commit(self, *writes: Write, returns: Literal["ALL_NEW", "ALL_OLD"] = "ALL_NEW") -> Item:
        """What no other branch can help: the same once more, as long as it only collides."""
        for _ in tries():
            try:
                return self.once(*writes, returns=returns)
            except Failed as failed:
                if not failed.busy:
                    raise
        raise overloaded()

    def once(self, *writes: Write, returns: Literal["ALL_NEW", "ALL_OLD"] = "ALL_NEW") -> Item:
        """One update, which returns the item, or a transaction, which returns nothing.

        Where the answer was lost, the same is sent once more: every write of ours either finds that
        it was done, by its condition, or does the same again without harm.
        """
        from botocore.exceptions import HTTPClientError

        try:
            return self._send(*writes, returns=returns)
        except HTTPClientError:
            return self._send(*writes, returns=returns)

    def _send(self, *writes: Write, returns: Literal["ALL_NEW", "ALL_OLD"]) -> Item:
        try:
            if len(writes) == 1 and isinstance(writes[0], Update):
                answer = self._client.update_item(**writes[0].rendered(self.name), ReturnValues=returns)
                return loaded(answer.get("Attributes", {}))
            self._client.transact_write_items(
                TransactItems=[
                    {"Update": write.rendered(self.name)} if isinstance(write, Update) else write for write in writes
                ]
            )
        except self._client.exceptions.ClientError as error:
            raise Failed.of(error) from error
        return {}


class Failed(Exception):
    """A write that did not happen: for each of its parts why not, and the item that was there."""

    def __init__(self, reasons: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(", ".join(reason.get("Code", "None") for reason in reasons))
        self._reasons = reasons
        failed = any(self.at(index) for index in range(len(reasons)))
        self.busy = not failed and any(reason.get("Code") in _BUSY for reason in reasons)
        self.expected = failed or self.busy

    @classmethod
    def of(cls, error: ClientError) -> Exception:
        """Raises again what is none of this."""
        response = cast("dict[str, Any]", error.response)
        failed = cls(response.get("CancellationReasons") or [{**response["Error"], "Item": response.get("Item")}])
        if not failed.expected:
            raise error
        return failed

    def at(self, index: int) -> bool:
        return self._reasons[index].get("Code") in ("ConditionalCheckFailed", "ConditionalCheckFailedException")

    def item(self, index: int) -> Item | None:
        item = self._reasons[index].get("Item") if self.at(index) else None
        return loaded(item) if item else None


class Update:
    """An UpdateItem, put together clause by clause. All names go by placeholders: some are reserved
    words, like `free`, and most have a `#` in them."""

    def __init__(self, pk: str, sk: str, *, exists: bool = True) -> None:
        self._key = key_of(pk, sk)
        self._names: dict[str, str] = {}
        self._values: dict[str, AttributeValueTypeDef] = {}
        self._conditions: list[str] = []
        self._sets: dict[str, Any] = {}
        self._adds: dict[str, int] = {}
        self._clauses: dict[str, list[str]] = {"SET": [], "ADD": [], "REMOVE": [], "DELETE": []}
        if exists:
            self.where(f"attribute_exists({self.name('pk')})")

    def name(self, attribute: str) -> str:
        return self._names.setdefault(attribute, f"#n{len(self._names)}")

    def value(self, value: object) -> str:
        self._values[name := f":v{len(self._values)}"] = dump(value)
        return name

    def where(self, condition: str) -> None:
        self._conditions.append(condition)

    def set(self, attribute: str, value: object, *, once: bool = False) -> None:
        name, new = self.name(attribute), self.value(value)
        self._sets[attribute] = value
        self._clauses["SET"].append(f"{name} = if_not_exists({name}, {new})" if once else f"{name} = {new}")

    def add(self, attribute: str, number: int) -> None:
        self._adds[attribute] = self._adds.get(attribute, 0) + number

    def remove(self, attribute: str) -> None:
        self._clauses["REMOVE"].append(self.name(attribute))

    def delete(self, attribute: str, members: Set[str]) -> None:
        self._clauses["DELETE"].append(f"{self.name(attribute)} {self.value(members)}")

    def take(self, attribute: str, bucket: Bucket | None, count: int, known: Mapping[str, int], now: int) -> None:
        """Takes `count` out of a bucket. An expression has no `max`, so there are two: one for a
        bucket that is full, and one for a bucket that fills, chosen by what is known of it."""
        if bucket is None:
            return
        name = self.name(attribute)
        if known.get(attribute, 0) <= now:
            self.where(f"(attribute_not_exists({name}) OR {name} <= {self.value(now)})")
            self.set(attribute, bucket.take(0, count, now))
        else:
            self.where(f"{name} > {self.value(now)} AND {name} <= {self.value(bucket.latest(count, now))}")
            self.add(attribute, bucket.take(0, count, 0))

    def seat(self, attribute: str, most: int | None, member: str) -> None:
        name = self.name(attribute)
        if most is not None:
            empty = f"attribute_not_exists({name}) OR " if most > 0 else ""
            self.where(f"({empty}size({name}) < {self.value(most)})")
        self._clauses["ADD"].append(f"{name} {self.value({member})}")

    def within(self, attribute: str, amount: int, most: int) -> None:
        name = self.name(attribute)
        empty = f"attribute_not_exists({name}) OR " if amount <= most else ""
        self.where(f"({empty}{name} <= {self.value(most - amount)})")

    def reckoned(self, known: Mapping[str, int]) -> Item:
        sums = {name: known.get(name, 0) + number for name, number in self._adds.items()}
        return {**known, **sums, **self._sets}

    def rendered(self, table: str) -> UpdateTypeDef:
        # The sums get their placeholders here, in copies: what is sent again must have none that it
        # does not use, or the service takes it for a mistake.
        values = self._values | {f":a{index}": dump(number) for index, number in enumerate(self._adds.values())}
        adds = [f"{self.name(name)} :a{index}" for index, name in enumerate(self._adds)]
        clauses = {**self._clauses, "ADD": self._clauses["ADD"] + adds}
        update: UpdateTypeDef = {
            "TableName": table,
            "Key": self._key,
            "UpdateExpression": " ".join(f"{verb} {', '.join(parts)}" for verb, parts in clauses.items() if parts),
            "ExpressionAttributeNames": {name: attribute for attribute, name in self._names.items()},
            "ExpressionAttributeValues": values,
        }
        if self._conditions:
            update["ConditionExpression"] = " AND ".join(self._conditions)
            update["ReturnValuesOnConditionCheckFailure"] = "ALL_OLD"
        return update


def _new_client() -> DynamoDBClient:
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "max_attempts": 4}, connect_timeout=2, read_timeout=5, max_pool_connections=32
    )
    return boto3.session.Session().client("dynamodb", config=config)


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
