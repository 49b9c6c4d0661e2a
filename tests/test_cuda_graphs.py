"""Sessions whose provider asks for CUDA graphs: one graph for each place of the states, at addresses that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hand_made import CHAINS, fir, fir_oracle, frames, run

from co3d_compile.runtime import step_bindings
from co3d_compile.runtime.session import StreamSession


class Card:
    """A session of onnxruntime on the CPU that notes which graph would run on a card, and what is bound anew."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.session = session
        self.graphs: list[tuple[str, int]] = []
        self.rebound = 0
        self.without: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {"CUDAExecutionProvider": {"enable_cuda_graph": "1"}}

    def io_binding(self) -> Binding:
        return Binding(self, self.session.io_binding())

    def run_with_iobinding(self, binding: Binding, options: ort.RunOptions) -> None:
        self.graphs.append((options.get_run_config_entry("gpu_graph_id"), id(binding)))
        self.session.run_with_iobinding(binding.binding)

    def run(self, names: Any, values: Any, options: ort.RunOptions) -> Any:
        self.without.append(options.get_run_config_entry("gpu_graph_id"))
        return self.session.run(names, values)


class Binding:
    def __init__(self, card: Card, binding: ort.IOBinding) -> None:
        self.card, self.binding, self.made = card, binding, False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("bind_"):
            self.card.rebound += 1
        return getattr(self.binding, name)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[Card]:
    made: list[Card] = []
    init = step_bindings.StepBindings.__init__

    def with_card(self: Any, session: ort.InferenceSession, *rest: Any) -> None:
        made.append(Card(session))
        init(self, made[-1], *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(step_bindings.StepBindings, "__init__", with_card)
    return made


@pytest.mark.parametrize("renamed", [False, True], ids=["paired", "renamed"])
@pytest.mark.parametrize("chains", CHAINS.values(), ids=CHAINS)
def test_each_place_of_the_states_is_a_graph(
    chains: tuple[tuple[float, ...], ...], renamed: bool, card: list[Card]
) -> None:
    session = StreamSession(fir(chains, renamed), batch=2)
    session._ort = card[0]  # type: ignore[assignment]
    bound = card[0].rebound
    x = frames(40, 2, 2, 3)
    np.testing.assert_allclose(run(session, x), fir_oracle(x, chains), rtol=1e-5, atol=1e-5)
    assert card[0].rebound == bound, "an address has changed behind a graph"
    graphs = dict(card[0].graphs)
    assert len(graphs) == len(set(graphs.values())) == len(set(card[0].graphs)) == session._states.period


def test_some_streams_advance_without_a_graph(card: list[Card]) -> None:
    session = StreamSession(fir(CHAINS[next(iter(CHAINS))]), batch=3)
    session._ort = card[0]  # type: ignore[assignment]
    session.step(frames(1, 2, 2, 3)[0], streams=[0, 2])
    assert card[0].without == ["-1"] and not card[0].graphs


def test_without_the_option_there_is_no_graph() -> None:
    session = StreamSession(fir(CHAINS[next(iter(CHAINS))]))
    assert not step_bindings.captures_graphs(session._ort)
    assert set(session._bindings.run_options) == {None}
