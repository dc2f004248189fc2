"""Random configurations: what is valid trains, what is not is one sentence and no file."""

import pytest
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dreamer_utils as utils
from small_runs import SMALL, configure, small

FIXED = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=15,
)
VALID = {
    "seed": st.integers(0, 2**31),
    "env.action_repeat": st.sampled_from([1, 2, 4]),
    "env.task": st.sampled_from(["balance", "swingup", "balance_sparse"]),
    "collector.exploration_noise": st.floats(0, 1),
    "replay_buffer.batch_length": st.integers(2, 8),
    "networks.state_dim": st.integers(1, 8),
    "networks.belief_dim": st.integers(1, 20),
    "networks.hidden_dim": st.integers(1, 20),
    "networks.min_std": st.floats(0.01, 1),
    "optimization.horizon": st.integers(2, 6),
    "optimization.gamma": st.floats(0, 1),
    "optimization.lambda_": st.floats(0, 1),
    "optimization.free_nats": st.floats(0, 10),
    "optimization.predict_discount": st.booleans(),
    "optimization.grad_clip": st.floats(0.1, 1000),
    "optimization.autocast": st.sampled_from(["false", "bfloat16"]),
}
NUMBERS = """
seed env.action_repeat collector.total_steps replay_buffer.batch_size networks.hidden_dim
optimization.gamma optimization.horizon optimization.world_model_lr
checkpoint.keep checkpoint.every logger.every
""".split()
CHOICES = "optimization.autocast optimization.compile env.backend logger.mode".split()
WORD = st.text("abcdefg", min_size=3, max_size=8)
INVALID = st.one_of(
    st.tuples(
        st.sampled_from(NUMBERS), st.sampled_from(["-1", "nan", "abc", "null", "[1]", "-inf"])
    ),
    st.tuples(st.sampled_from(CHOICES), st.text("abcxyz", min_size=4, max_size=8)),
    st.tuples(WORD, st.just("1")),
    st.tuples(WORD.map("+{}".format), st.just("1")),
)


@FIXED
@given(st.fixed_dictionaries({}, optional=VALID))
def test_a_valid_configuration_trains(tmp_path_factory, chosen):
    flags = [f"{key}={value}" for key, value in chosen.items()]
    length = chosen.get("replay_buffer.batch_length", 8)
    run = tmp_path_factory.mktemp("random") / "run"
    flags += [f"replay_buffer.batch_size={2 * length}", "collector.total_steps=80"]
    _, rows = small(run, *flags, "eval.every=0")
    assert rows[-1]["updates"] == 2


@FIXED
@given(INVALID)
def test_an_invalid_configuration_is_one_sentence_at_once(tmp_path, wrong):
    run = tmp_path / "run"
    with pytest.raises(Exception) as caught:
        configure(*SMALL, f"run_dir={run}", f"{wrong[0]}={wrong[1]}")
    known = utils.UserError, HydraException
    assert isinstance(caught.value, known), caught.value
    if isinstance(caught.value, utils.UserError):
        assert "\n" not in str(caught.value)
    assert not run.exists()
