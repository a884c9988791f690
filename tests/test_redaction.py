"""Tokens and home folders are taken out of what is written, as lmms-eval takes out tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lmms_eval import evaluator

from lmms_keyspace.errors import InputError
from lmms_keyspace.redaction import publishable, without_secrets

TOKEN = "hf_" + "aB3" * 11
NAMES = st.sampled_from(
    [
        "token",
        "hf_token",
        "Hub_Token",
        "client_secret",
        "my_secret",
        "OPENAI_API_KEY",
        "db_password",
        "tokens",
        "revision",
    ]
)
VALUES = st.one_of(st.integers(), st.none(), st.sampled_from([TOKEN, f"at {TOKEN}.", "hf_short", "", "plain"]))
ASSIGNED = st.lists(st.tuples(NAMES, VALUES), max_size=4).map(lambda pairs: ",".join(f"{n}={v}" for n, v in pairs))
SETTINGS = st.recursive(
    VALUES | ASSIGNED,
    lambda inner: st.dictionaries(NAMES, inner) | st.lists(inner) | st.tuples(inner, inner),
    max_leaves=8,
)


@given(SETTINGS)
def test_secrets_are_hidden_exactly_as_lmms_eval_hides_them(settings):
    assert without_secrets(settings) == evaluator._redact_eval_config_secrets(settings)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/alice/models/llava", "~/models/llava"),
        ("pretrained=/home/alice/llava,peft=/Users/bob.b/x", "pretrained=~/llava,peft=~/x"),
        ("mean_shift:/root", "mean_shift:~"),
        ("/root", "~"),
        ("{'output_path': '/home/alice'}", "{'output_path': '~'}"),
        ("/srv/people/carol/out", "~/out"),  # the home folder of this process, see below
        ("/srv/people/caroline/out", "/srv/people/caroline/out"),
        ("/data/home/alice", "/data/home/alice"),  # a folder called home, not the place of homes
        ("org/home/model", "org/home/model"),
        ("./home/alice/x", "./home/alice/x"),
        ("/rooted/x", "/rooted/x"),
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"),
    ],
)
def test_home_folders_are_tildes(text, shown, monkeypatch):
    monkeypatch.setenv("HOME", "/srv/people/carol")
    assert publishable(text) == shown
    assert publishable({"deep": [(text,)]}) == {"deep": [(shown,)]}


def test_a_home_that_is_the_root_of_all_paths_hides_nothing(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert Path.home() == Path("/")
    assert publishable("/data/model") == "/data/model"


def test_an_error_names_no_secret_but_the_path_as_it_was_given():
    assert TOKEN not in str(InputError("token", TOKEN, "no such argument"))
    assert TOKEN not in str(InputError("revision", TOKEN, "no such branch"))
    assert "/home/alice/x" in str(InputError("pretrained", "/home/alice/x", "no model lies there"))
