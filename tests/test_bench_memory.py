"""The benches of memory and of attention over sensors: what they report, on small cases."""

import pyarrow.parquet as pq
import pytest
import torch

from zoo.bench import memory, sensors


@pytest.mark.slow
def test_a_streamed_table_is_measured_in_its_own_process(capsys):
    found = memory.measure(["table_stream"], rows=3000)["table_stream"]
    assert 0 < found["before"] < found["peak"] and found["file"] > 3000 * 300 * 3
    memory.show({"table_stream": found})
    line = capsys.readouterr().out
    assert "table_stream" in line and ("within" in line or "ABOVE" in line)
    memory.show({"table_stream": {**found, "limit": found["peak"] - 1}})
    assert "ABOVE" in capsys.readouterr().out


def test_the_table_written_has_gaps_and_all_rows(tmp_path):
    memory.write_table(tmp_path / "t.parquet", rows=memory.PIECE_ROWS + 5, columns=4)
    frame = pq.read_table(tmp_path / "t.parquet").to_pandas()
    assert frame.shape == (memory.PIECE_ROWS + 5, 5)
    assert 0.005 < frame.x0.isna().mean() < 0.02 and not frame.y.isna().any()


def test_pairs_of_groups_grow_as_four_thirds_and_are_those_of_the_layer():
    grown = sensors.exponent(
        list(sensors.SENSORS), [float(sensors.pairs(n)["groups"]) for n in sensors.SENSORS]
    )
    assert grown == pytest.approx(4 / 3, abs=0.03)
    assert sensors.pairs(100)["all pairs"] == 100**2
    calls = sensors.contestants(30, "softmax")
    assert list(calls) == ["all pairs", "groups"]
    for call in calls.values():
        call()
    layer = sensors.GroupAttention(lambda *a, **k: torch.nn.Identity(), 8, 2, num_nodes=100)
    assert sensors.pairs(100)["groups"] == layer.groups * layer.group_size**2 + layer.groups**2
