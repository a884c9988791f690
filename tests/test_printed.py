"""The printed table: the headline of our tasks with intervals, other tasks as they were, and the results untouched."""

from __future__ import annotations

import copy

from lmms_eval import utils

from lmms_keyspace import harness
from lmms_keyspace.printed import shortened

RESULTS = {
    "results": {
        "probe": {
            "alias": "probe",
            "gain,none": 0.25,
            "gain_ci_lo,none": 0.125,
            "gain_ci_hi,none": 0.5,
            "gain_mde,none": 0.0625,
            "gain_stderr,none": "N/A",
            "gain_n,none": 40,
            "rare,none": None,
            "rare_ci_lo,none": None,
            "rare_ci_hi,none": None,
            "detail,none": 0.75,
        },
        "stock": {"alias": "stock", "acc,none": 0.5, "acc_stderr,none": 0.1},
    },
    "configs": {
        "probe": {
            "metric_list": [
                {"metric": "gain", "shown": True},
                {"metric": "rare", "shown": True},
                {"metric": "detail", "shown": False},
            ]
        },
        "stock": {"metric_list": [{"metric": "acc"}]},
    },
    "n-shot": {"probe": 0, "stock": 0},
    "higher_is_better": {"probe": {"gain": True}, "stock": {"acc": True}},
}


def test_the_headline_with_its_interval_and_nothing_of_other_tasks():
    before = copy.deepcopy(RESULTS)
    short = shortened(RESULTS)
    assert before == RESULTS
    assert short["results"]["probe"] == {
        "alias": "probe",
        "gain,none": "0.2500 [0.1250, 0.5000] (mde 0.062)",
        "gain_stderr,none": "N/A",
        "rare,none": None,
    }
    assert short["results"]["stock"] == RESULTS["results"]["stock"]


def test_lmms_eval_prints_it():
    table = harness._hooked_table(utils.make_table)(copy.deepcopy(RESULTS))
    assert "0.2500 [0.1250, 0.5000] (mde 0.062)" in table
    assert "detail" not in table
    assert "|0.5000|" in table.replace(" ", "")


def test_it_is_placed_where_the_command_line_takes_it_from(monkeypatch):
    import types

    main = types.ModuleType("lmms_eval.__main__")
    main.make_table = utils.make_table
    monkeypatch.setitem(harness.sys.modules, "lmms_eval.__main__", main)
    harness._hook_table()
    hooked = main.make_table
    assert hooked is not utils.make_table
    harness._hook_table()  # a second time changes nothing
    assert main.make_table is hooked
