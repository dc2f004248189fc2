"""Wrong command lines and environments, and the words that each of them must get."""

import re
import shutil

from attack_children import Child, one_sentence, snapshot

from small_runs import SMALL

# key, a value out of range, what is said of it
INTEGERS = """
seed -1 greater than or equal to 0
seed 4294967296 less than 4294967296
env.camera -2 greater than or equal to -1
env.action_repeat 0 greater than 0
env.time_limit 0 greater than 0
env.n_parallel_envs 0 greater than 0
collector.total_steps 0 greater than 0
collector.random_steps 0 greater than 0
collector.train_every 0 greater than 0
replay_buffer.batch_size 0 greater than 0
replay_buffer.batch_length 1 greater than or equal to 2
replay_buffer.capacity 0 greater than 0
networks.state_dim 0 greater than 0
networks.belief_dim 0 greater than 0
networks.hidden_dim 0 greater than 0
networks.channels 0 greater than 0
optimization.pretrain -1 greater than or equal to 0
optimization.horizon 1 greater than or equal to 2
eval.every -1 greater than or equal to 0
eval.episodes 0 greater than 0
eval.time_limit -1 greater than or equal to 0
eval.dream_episode -1 greater than or equal to 0
eval.dream_step -1 greater than or equal to 0
checkpoint.every 0 greater than 0
checkpoint.keep 0 greater than 0
logger.every 0 greater than 0
logger.video_every 0 greater than 0
"""
NUMBERS = """
collector.exploration_noise -0.1 greater than or equal to 0
networks.min_std 0 greater than 0
networks.action_std 0 greater than 0
networks.action_mean_scale 0 greater than 0
optimization.train_ratio -0.1 greater than or equal to 0
optimization.gamma 1.5 less than or equal to 1
optimization.lambda_ -0.5 greater than or equal to 0
optimization.kl_scale -1 greater than or equal to 0
optimization.free_nats -1 greater than or equal to 0
optimization.discount_scale -1 greater than or equal to 0
optimization.world_model_lr 0 greater than 0
optimization.actor_lr -1e-3 greater than 0
optimization.value_lr 0 greater than 0
optimization.adam_eps 0 greater than 0
optimization.grad_clip 0 greater than 0
"""
BOOLEANS = """
doctor env.from_pixels optimization.predict_discount eval.video checkpoint.resume
checkpoint.overwrite checkpoint.lock checkpoint.drop_damaged logger.video logger.progress
logger.artifact replay_buffer.keep
""".split()
STRINGS = """
task name run_dir resume export export_dir device env.name env.task replay_buffer.directory
eval.checkpoint logger.project
""".split()
CHOICES = """
env.backend 'dm_control' or 'gymnasium'
optimization.autocast 'auto', 'false', 'true', 'bfloat16' or 'float16'
optimization.compile 'auto', 'false', 'true' or 'reduce-overhead'
logger.mode 'offline', 'online', 'disabled' or 'dryrun'
"""
NOT_KINDS = {
    "integer": ["abc", "null", "1.5", "[1]", "{a:1}"],
    "number": ["abc", "null", "[1]", "nan", "inf"],
    "boolean": ["abc", "null", "2", "[1]"],
    "string": ["null", "[1]", "{a:1}"],
}


def table(text):
    """(key, value, words) of each line."""
    return [line.split(maxsplit=2) for line in text.strip().splitlines()]


def wrong_values():
    """(words, sentence) of every key with values of the wrong kind, out of range, or unknown."""
    kinds = {key: "integer" for key, _, _ in table(INTEGERS)}
    kinds |= {key: "number" for key, _, _ in table(NUMBERS)}
    kinds |= dict.fromkeys(BOOLEANS, "boolean") | dict.fromkeys(STRINGS, "string")
    lines = []
    for key, kind in kinds.items():
        if kind in ("integer", "number"):
            lines.append((f"{key}=true", f"error: {key}=True: it should be a number"))
        for value in NOT_KINDS[kind]:
            noun = "finite number" if value in ("nan", "inf") else f"valid {kind}"
            lines.append((f"{key}={value}", f"error: {key}=.*: it should be a {noun}"))
    for key, value, words in table(INTEGERS) + table(NUMBERS):
        lines.append((f"{key}={value}", f"error: {key}=.*: it should be {words}"))
    for line in CHOICES.strip().splitlines():
        key, words = line.split(maxsplit=1)
        for value in ("bogus", "null", "3", "[auto]"):
            lines.append((f"{key}={value}", f"error: {key}=.*: it should be {words}"))
    return lines


# {run}: a run that was stopped in the middle; {new}: no such directory; {here}: an empty one.
LINES = [
    # unknown keys, sections, syntax
    ("sed=1", "Could not override 'sed'"),
    ("env.nam=x", "Could not override 'env.nam'"),
    ("+foo=1", "foo: there is no such key, config.yaml lists all"),
    ("++foo=1", "foo: there is no such key"),
    ("+env.foo=1", "env.foo: there is no such key"),
    ("+env.name.foo=1", "error: |Could not append"),
    ("+replay_buffer.memory=1", "replay_buffer.memory: there is no such key"),
    ("env=3", "error: config: .*trying to access env.name"),
    ("env=null", "error: config: .*trying to access env.name"),
    ("env=[1]", "Error merging override env="),
    ("optimization=fast", "error: optimization=|Could not override"),
    ("~seed", "error: config: Interpolation key 'seed' not found"),
    ("~env.task", "error: config: Interpolation key 'env.task' not found"),
    ("~env.camera", "env.camera has no value: give one, or leave config.yaml whole"),
    ("~env", "error: config: Interpolation key 'env.name' not found"),
    ("~networks", "networks has no value: give one, or leave config.yaml whole"),
    ("~nothing", "Could not delete"),
    ("seed", "Error parsing override|mismatched input|missing EQUAL"),
    ("seed=1=2", "mismatched input"),
    ("seed=[1", "mismatched|no viable|Error parsing|missing"),
    ("seed=${nothing}", "error: config: Interpolation key 'nothing' not found"),
    ("name=${oc.env:SURELY_NOT_THERE}", "error: config: .*SURELY_NOT_THERE"),
    ("name=${name}", "error: config: "),
    ("name=${bogus:1}", "error: config: Unsupported interpolation type bogus"),
    ("seed=${env}", "error: seed=.*: it should be a valid integer"),
    ("name=???", "error: config: Missing mandatory value: name"),
    ("--config-name nothing", "Cannot find primary config 'nothing'"),
    ("--bogus", "unrecognized arguments: --bogus"),
    # strings
    ("name=", "error: name=: it should not be empty"),
    ("run_dir=", "error: run_dir=: it should not be empty"),
    ("logger.project=", "error: logger.project=: it should not be empty"),
    ("logger.project=a/b", "error: logger.project=a/b: it should not be empty, and have none of"),
    ("logger.project=a%b", "error: logger.project=a%b: it should not be empty, and have none of"),
    # combinations
    ("replay_buffer.batch_size=25", "must be a multiple of replay_buffer.batch_length=8"),
    ("env.action_repeat=3", "env.time_limit=40 is no multiple of env.action_repeat=3"),
    ("replay_buffer.batch_length=24 replay_buffer.batch_size=24", "longer than an episode"),
    ("collector.random_steps=39", "does not fill an episode of every environment: raise it to 40"),
    ("env.n_parallel_envs=3", "does not fill an episode of every environment: raise it to 120"),
    ("collector.total_steps=79", "ends before training starts: raise it above"),
    ("replay_buffer.capacity=79", "cannot hold the 80 steps of collector.random_steps"),
    ("logger.video=true", "films need env.from_pixels=true"),
    ("eval.video=true", "films need env.from_pixels=true"),
    ("eval.dream_episode=1", "films need env.from_pixels=true"),
    ("env.from_pixels=true eval.video=true", "need eval.checkpoint=..."),
    ("env.from_pixels=true eval.dream_episode=1", "need eval.checkpoint=..."),
    ("eval.dream_step=4", "eval.dream_step needs eval.dream_episode=1"),
    ("checkpoint.overwrite=true", "does nothing without checkpoint.resume=false"),
    ("checkpoint.drop_damaged=true checkpoint.resume=false", "leave out checkpoint.resume=false"),
    # sizes
    ("networks.hidden_dim=1000000", "lower networks.* or replay_buffer.batch_size"),
    ("networks.belief_dim=10000000", "lower networks.* or replay_buffer.batch_size"),
    ("replay_buffer.batch_size=80000000000", "lower networks.* or replay_buffer.batch_size"),
    ("networks.state_dim=100000000000", "lower networks.* or replay_buffer.batch_size"),
    ("networks.hidden_dim=99999999999999999999", "lower networks.* or replay_buffer.batch_size"),
    ("optimization.horizon=1000000000", "lower "),
    (
        "collector.total_steps=1000000000000 replay_buffer.capacity=1000000000000",
        "lower replay_buffer.capacity, or choose another run_dir",
    ),
    # devices, tasks
    ("device=tpu", "error: device=tpu: "),
    ("device=meta", "error: device=meta: choose auto, cpu, cuda or cuda:N"),
    ("device=", "error: device=: "),
    ("device=cpu:x", "error: device=cpu:x: "),
    ("device=cuda:99", "error: device=cuda:99: "),
    ("device=mps", "error: device=mps: "),
    ("env.name=carpole", "error: env.name=carpole: choose one of acrobot"),
    ("env.name=", "error: env.name=: choose one of acrobot"),
    ("env.task=fly", "error: env.task=fly: choose one of balance"),
    ("env.task=", "error: env.task=: choose one of balance"),
    ("env.from_pixels=true env.camera=9", "error: env.camera=9: cartpole has 2 cameras"),
    ("env.backend=gymnasium", "error: env.name=cartpole cannot be made by gymnasium"),
    ("env.backend=gymnasium env.name=", "error: env.name= cannot be made by gymnasium"),
    ("env.backend=gymnasium env.name=CartPole-v1", "discrete or unbounded actions"),
    ("env.backend=gymnasium env.name=nothing:Nothing-v0", "cannot be made by gymnasium"),
    ("env.backend=gymnasium env.name=Walker2d-v99", "cannot be made by gymnasium"),
    ("env.backend=gymnasium env.name=a/b/c", "cannot be made by gymnasium"),
    # places
    ("run_dir=/dev/null/run", "error: .*(/dev/null|Not a directory)"),
    ("run_dir=/dev/null", "error: .*/dev/null"),
    ("run_dir=/proc/run", "error: .*/proc"),
    ("run_dir=/sys/run", "error: .*/sys"),
    ("run_dir={here}/file", "error: .*file"),
    ("run_dir={here}/file/run", "error: .*file"),
    ("run_dir=" + "x" * 300, "error: File name too long"),
    ("run_dir={here}/loop/run", "error: .*loop"),
    ("run_dir={here}/broken", "error: .*broken"),
    # checkpoints that are not there, or are none
    ("eval.checkpoint=nothing", "error: eval.checkpoint=nothing does not exist"),
    ("eval.checkpoint={here}", "holds no checkpoints: name a run directory"),
    ("eval.checkpoint={here}/file", "error: .*can be loaded"),
    ("eval.checkpoint=/dev/null", "error: .*can be loaded"),
    ("eval.checkpoint={run}/config.yaml", "error: .*can be loaded"),
    ("eval.checkpoint={run}/checkpoints", "holds no checkpoints: name a run directory"),
    ("eval.checkpoint={here}/loop", "error: "),
    ("eval.checkpoint={here}/broken", "does not exist"),
    ("eval.checkpoint=" + "x" * 300, "error: "),
    # export
    ("export=nothing", "error: export=nothing does not exist"),
    ("export={here}", "error: export=.*here holds no checkpoints: name a run directory"),
    ("export={here}/file", "error: .*can be loaded"),
    ("export_dir={here}/agent", "error: export_dir=... needs export=RUN"),
    ("export={run} eval.checkpoint={run} ONLY", "error: export=... only writes a file"),
    ("export={run} export_dir={here}/file ONLY", "error: .*file"),
    ("export={run} export_dir=/proc/agent ONLY", "error: /proc/agent/agent.torchrl could not"),
    ("export={run} seed=3 ONLY", "error: seed=3: export brings its own configuration"),
    # a run that is there
    ("run_dir={run} checkpoint.resume=false", "holds a run: checkpoint.resume=true goes on"),
    ("run_dir={run} checkpoint.resume=false checkpoint.overwrite=true env.task=fly", "choose one"),
    ("run_dir={run}/config.yaml", "error: "),
    ("run_dir={run}/checkpoints/run eval.checkpoint=nothing", "does not exist"),
]
ELSEWHERE = """
seed=1 env.task=swingup env.action_repeat=4 env.time_limit=80 env.from_pixels=true env.camera=1
env.name=pendulum collector.random_steps=120 collector.train_every=80
collector.exploration_noise=0.5 replay_buffer.batch_size=32 replay_buffer.capacity=90
networks.state_dim=5 networks.belief_dim=17 networks.hidden_dim=17 networks.channels=3
networks.min_std=0.2 networks.action_std=4.0 networks.action_mean_scale=3.0
optimization.train_ratio=0.05 optimization.pretrain=3 optimization.horizon=5
optimization.gamma=0.9 optimization.lambda_=0.5 optimization.kl_scale=2.0
optimization.free_nats=0 optimization.predict_discount=true optimization.discount_scale=1.0
optimization.world_model_lr=1e-3 optimization.actor_lr=1e-3 optimization.value_lr=1e-3
optimization.adam_eps=1e-3 optimization.grad_clip=0.01 optimization.autocast=bfloat16
optimization.compile=true
""".split()
# words, environment variables, what is said, exit code
ENVIRONMENTS = [
    ("env.from_pixels=true", {"MUJOCO_GL": "bogus"}, "MUJOCO_GL=bogus does not render", 1),
    ("env.from_pixels=true", {"MUJOCO_GL": "disabled"}, "MUJOCO_GL=disabled does not render", 1),
    ("", {"MUJOCO_GL": "bogus"}, "finished at", 0),
    ("", {"TMPDIR": "/nothing"}, "finished at", 0),
    ("", {"HOME": "/nothing"}, "finished at", 0),
    ("", {"HOME": None}, "finished at", 0),
    ("", {"PATH": ""}, "finished at", 0),
    ("", {"COLUMNS": "bogus", "LINES": "-1"}, "finished at", 0),
    ("logger.mode=offline", {"HOME": "/nothing"}, "finished at", 0),
    ("logger.mode=offline", {"TMPDIR": "/nothing"}, "finished at", 0),
    ("logger.mode=offline", {"WANDB_DIR": "/nothing"}, "finished at", 0),
    ("logger.mode=${oc.env:WANDB_MODE}", {"WANDB_MODE": "bogus"}, "error: logger.mode=bogus: ", 1),
    ("logger.mode=${oc.env:WANDB_MODE}", {"WANDB_MODE": ""}, "error: logger.mode=: ", 1),
    ("logger.mode=online", {"WANDB_API_KEY": None, "NETRC": "/nothing"}, "needs an API key", 1),
    ("logger.mode=online", {"WANDB_API_KEY": "bad"}, "error: ", 1),
    ("logger.mode=online", {"WANDB_API_KEY": "a" * 40}, "wandb does not answer", 1),
    ("logger.mode=online", {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "bogus"}, "base_url", 1),
    ("device=cuda", {"CUDA_VISIBLE_DEVICES": ""}, "error: device=cuda: ", 1),
    ("doctor=true", {"TMPDIR": "/nothing"}, "ok      speed", 0),
    ("doctor=true run_dir=/proc/run", {}, "problem run_dir", 1),
    ("doctor=true env.task=fly device=tpu seed=3", {}, "problem task", 1),
]


def all_lines():
    """(words, environment, sentence, exit code) of every line."""
    lines = [(words, {}, said, None) for words, said in LINES + wrong_values()]
    for word in ELSEWHERE:
        key = word.split("=")[0]
        said = f"holds a run with .*{re.escape(key)}=|error: .*{re.escape(key)}"
        lines.append((f"run_dir={{run}} {word}", {}, said, 1))
        # or what does not go together here
        said = (
            "eval.checkpoint brings its own configuration: leave this out|error: .*replay_buffer"
        )
        said += "|error: collector.random_steps does not fill"
        lines.append((f"eval.checkpoint={{run}} {word} ONLY", {}, said, 1))
    return lines + ENVIRONMENTS


def attack_lines(counts, folder, run_dir, every):
    """Tries every `every`-th line against a new directory and against the run in `run_dir`."""
    here = folder / "here"
    here.mkdir()
    (here / "file").write_text("nothing\n")
    (here / "loop").symlink_to("loop")
    (here / "broken").symlink_to("nothing")
    saved, surroundings = snapshot(run_dir), snapshot(here)
    for number, (words, env, sentence, code) in enumerate(all_lines()[::every]):
        new = folder / f"line{number}"
        case = f"{words} {env or ''}"
        counts.cases["command lines"] += 1
        places = {"{run}": run_dir, "{here}": here, "{new}": new}
        given = [f"run_dir={new}", *words.removesuffix(" ONLY").split()]
        for place, path in places.items():
            given = [word.replace(place, str(path)) for word in given]
        given = given if words.endswith(" ONLY") else [*SMALL, *given]
        ended, said = Child(given, folder / "said", env).wait(60)
        if not counts.check_words(case, said):
            continue
        refused = ended in (1, 2) if code is None else ended == code
        plain = not said.startswith("error: ") or one_sentence(ended, said)
        if not refused or not re.search(sentence, said) or not plain:
            counts.problem("wrong sentences", f"{case}: exit code {ended}", said)
        if new.exists():
            if ended:
                counts.problem("runs destroyed", f"{case}: a directory is left behind", said)
            shutil.rmtree(new)
        if snapshot(run_dir) != saved or snapshot(here) != surroundings:
            counts.problem("runs destroyed", f"{case}: files were changed", said)
            return
