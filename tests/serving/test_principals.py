"""Files of keys: what each entry may hold, and an error for everything else that names the entry and shows no key."""

from __future__ import annotations

import pytest
import yaml

from safelight.errors import InvalidParameterError
from safelight.serving.principals import MOST_PRIORITY, Principal, owner_of, read_key, read_keys

KEY, OTHER = "k" * 32, "sk-another-key-0123456789"
SEVERAL = f"""# who may use this server
---
keys:
  - name: shop
    key: {KEY}
    priority: 5
    max_cost: 1000000
    max_seconds: 30
    requests_per_minute: 60
    share: 0.5
  - {{name: trial, key: {OTHER}, share: null}}
"""


@pytest.fixture
def read(tmp_path):
    """Return a function that writes a file of keys and reads it."""

    def read(text, max_cost=60e6):
        path = tmp_path / "keys"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_keys(str(path), max_cost)

    return read


@pytest.mark.parametrize(
    "text", [KEY, f"\n {KEY} \nwhat it is for\n", "#" * 16, "a key with spaces", "keys:is-no-list-of-keys"]
)
def test_a_single_line_is_a_key_that_may_do_everything(read, tmp_path, text):
    key = text.strip().partition("\n")[0].strip()
    keys = read(text)
    assert keys.principal(key) == Principal(owner=owner_of(key), priority=MOST_PRIORITY)
    assert keys.principal(key + "x") is keys.principal("") is None
    assert read_key(str(tmp_path / "keys")) == key


def test_the_owner_of_a_key_is_what_jobs_of_earlier_versions_have():
    assert owner_of("k" * 32) == "ff7de3aac3e090ab708a7ce312064bff" and owner_of(None) == owner_of("") == ""


def test_several_keys(read):
    keys = read(SEVERAL)
    shop, trial = keys.principal(KEY), keys.principal(OTHER)
    assert shop == Principal("shop", owner_of(KEY), 5, 1e6, 30.0, 60, 0.5, is_one_of_several=True)
    assert trial == Principal("trial", owner_of(OTHER), 0, is_one_of_several=True)
    assert keys.principal("") is keys.principal(KEY[:-1]) is None
    assert KEY not in repr(keys) + repr(keys.principals) + repr(vars(keys))


def entry(**fields):
    given = {"name": "a", "key": f"{OTHER}", **fields}
    lines = [f"{name}: {value}" for name, value in given.items() if value is not None]
    return "keys:\n  - name: first\n    key: " + KEY + "\n  - " + "\n    ".join(lines) + "\n"


WRONG = {
    "no YAML": ("keys: [", "line 1"),
    "a tab": ("keys:\n\t- name: a", "line 2"),
    "no list": ("keys: 3", "a list of entries"),
    "an empty list": ("keys: []", "a list of entries"),
    "something beside": (f"{entry()}more: 1\n", "nothing else"),
    "an entry that is a text": (f"keys:\n  - {OTHER}\n", "entry 1: got no mapping"),
    "no name": (entry(name=None), "entry 2: name: got nothing"),
    "a blank name": (entry(name="' '"), "entry 2: name: got nothing"),
    "a number as name": (entry(name="1"), "entry 2: name: got 1"),
    "no key": (entry(key=None), "entry 2: key: got nothing"),
    "a short key": (entry(key="x" * 15), "entry 2: key: got 15 characters; it takes a text of 16"),
    "a key with a space": (entry(key="a key that has spaces"), "entry 2: key: got 21 characters; .*without spaces"),
    "a key beyond ASCII": (entry(key="é" * 20), "entry 2: key: got 20 characters"),
    "a number as key": (entry(key="1234567890123456789"), "entry 2: key: got a value of the kind int"),
    "a key twice": (entry(key=KEY), "entry 2: key: is 'first''s already"),
    "a name twice": (entry(name="first"), "entry 2: name: got 'first'; it takes a name of its own"),
    "an unknown field": (entry(prioriti="1"), "entry 2: unknown parameter 'prioriti'.*priority"),
    "a field that is no text": (entry(**{"3": "1"}), "entry 2: unknown parameter '3'"),
    "priority too high": (entry(priority=11), "entry 2: priority: got 11; it takes a whole number from -10 to 10"),
    "priority true": (entry(priority="true"), "entry 2: priority: got True"),
    "max_cost beyond the server's": (
        entry(max_cost=2e8),
        "entry 2: max_cost: got 200,000,000; it takes at most 60,000,000",
    ),
    "max_cost of 0": (entry(max_cost=0), "entry 2: max_cost: got 0"),
    "max_cost of no number": (entry(max_cost=".nan"), "entry 2: max_cost: got nan"),
    "max_seconds of 0": (entry(max_seconds=0), "entry 2: max_seconds: got 0"),
    "half a request": (entry(requests_per_minute=0.5), "entry 2: requests_per_minute: got 0.5"),
    "a share above 1": (entry(share=1.5), "entry 2: share: got 1.5"),
    "no share": (entry(share="much"), "entry 2: share: got 'much'"),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(read, tmp_path, text, said):
    with pytest.raises(InvalidParameterError, match=said) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith(f"api_key_file: {str(tmp_path / 'keys')!r}: ") and caught.value.param == "api_key_file"
    assert KEY not in message and OTHER not in message and "x" * 15 not in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__, "a traceback would show the file"


def test_shares_are_at_most_all(read):
    two = entry(share=0.6).replace(f"key: {KEY}\n", f"key: {KEY}\n    share: 0.5\n")
    with pytest.raises(InvalidParameterError, match=r"share: got 1\.1 of all entries together; it takes at most 1"):
        read(two)
    assert len(read(two.replace("0.6", "0.5")).principals) == 2


@pytest.mark.parametrize("text", [b"\xff" * 20, "", "short", "é" * 20, "keys"])
def test_what_is_no_key_at_all(read, text):
    with pytest.raises(InvalidParameterError, match="api_key_file: got"):
        read(text)


def test_tenants_have_their_shares_and_equal_parts_of_the_rest(read):
    def entry(name, **more):
        return {"name": name, "key": f"{name:-<20}", **more}

    def shares(*entries):
        keys = read(yaml.safe_dump({"keys": list(entries)}))
        names = {each.owner: each.name for each in keys.principals}
        return {names[owner]: tenant.share for owner, tenant in keys.tenants().items()}

    some = (entry("a", share=0.5), entry("b"), entry("c"), entry("d", share=0))
    assert shares(*some) == {"a": 0.5, "b": 0.25, "c": 0.25, "d": 0.0}
    assert shares(entry("a"), entry("b"), entry("c"), entry("d")) == dict.fromkeys("abcd", 0.25)
    assert shares(entry("a", share=0.6), entry("b", share=0.4), entry("c")) == {"a": 0.6, "b": 0.4, "c": 0.0}
    assert read(KEY).tenants() == {}
