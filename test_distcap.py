"""Tests of distcap.py, in its order.

What is right comes from elsewhere: plain loops, enumeration, other libraries, recorded numbers.
"""

import contextlib
import functools
import inspect
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import string
import subprocess
import sys
import time
import types
import zlib
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the recorded numbers are a CPU's
os.environ["OMP_NUM_THREADS"] = "1"  # sums of one order here and in other processes

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from pytest import approx, raises  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import distcap as m  # noqa: E402

parametrize = pytest.mark.parametrize

PROGRAM = Path(m.__file__).resolve()

# ==================================================================================================
# Shared: small models and pictures
# ==================================================================================================


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def unit(*shape, seed=0):
    """Random unit-norm rows."""
    rows = np.random.RandomState(seed).randn(*shape)
    return F.normalize(torch.from_numpy(rows).float(), dim=-1)


def edit(path, change):
    """Apply change(data) to a JSON file. -> its path"""
    data = m.read_json(path)
    change(data)
    m.write_json(path, data)
    return path


def small_blip(words, side, bos, eos, dropout=0.):
    """A BLIP of two layers with random weights."""
    from transformers import BlipConfig, BlipForConditionalGeneration
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2}
    text = {"bos_token_id": bos, "sep_token_id": eos, "eos_token_id": eos, "pad_token_id": 0,
            "vocab_size": words, "max_position_embeddings": 64, "encoder_hidden_size": 32,
            "hidden_dropout_prob": dropout}
    vision = {"image_size": side, "patch_size": 8}
    config = BlipConfig(text_config=size | text, vision_config=size | vision)
    return BlipForConditionalGeneration(config)


def small_clip(context, words):
    """The configuration of an open_clip.CLIP of one layer."""
    return {"embed_dim": 24,
            "vision_cfg": {"layers": 1, "width": 32, "patch_size": 8, "image_size": 32,
                           "head_width": 16},
            "text_cfg": {"context_length": context, "vocab_size": words, "width": 32, "heads": 2,
                         "layers": 1}}


def bert_tokenizer():
    """A tokenizer like BLIP's, of letters and a few words."""
    from transformers import BertTokenizer
    letters = [*string.ascii_letters, *string.digits, *string.punctuation]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "cap", "same", "text", "man"]
    words += letters + [f"##{letter}" for letter in letters]
    return BertTokenizer(vocab={word: k for k, word in enumerate(words)})


def image_processor(side):
    from transformers import BlipImageProcessor
    return BlipImageProcessor(size={"height": side, "width": side})


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folders blip/ and clip/ as transformers and open_clip write them, with random weights."""
    import open_clip
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    words = bert_tokenizer()
    for part in (small_blip(len(words), 48, bos=5, eos=3), words, image_processor(48)):
        part.save_pretrained(folder / "blip")
    config = small_clip(77, 49408)
    m.write_json(folder / "clip/open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})
    save_file(open_clip.CLIP(**config).state_dict(), folder / "clip/open_clip_model.safetensors")
    return folder


@pytest.fixture
def photos(tmp_path):
    """A folder with twelve pictures, 8 train, 2 val, 2 test, and k.json in Karpathy's format."""
    folder = tmp_path / "photos"
    (folder / "img").mkdir(parents=True)
    images = []
    for k, split in enumerate(8 * ["train"] + 2 * ["val"] + 2 * ["test"]):
        Image.new("RGB", (60, 50), (20 * k, 90, 250 - 20 * k)).save(folder / f"img/{k}.bmp")
        images.append({"filename": f"{k}.bmp", "imgid": k, "split": split,
                       "sentences": [{"raw": f" cap  {k} "}, {"raw": "same\ntext"}]})
    m.write_json(folder / "k.json", {"images": images})
    return folder


def rows_of(text):
    """Numbers in lines -> (lines,numbers)."""
    return torch.tensor([[int(word) for word in line.split()] for line in text.split("\n")])


def readme_block(words):
    """The Python snippet of the README that holds these words."""
    text = (PROGRAM.parent / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    found, = [block for block in blocks if words in block]
    return found


# ==================================================================================================
# 1. Rewards
# ==================================================================================================


def reward_case():
    """3 captions, 7 texts, 5 images; own entries at odd places, one image twice in the pool."""
    own_text = torch.zeros(3, 7, dtype=torch.bool)
    own_text[[0, 1, 2], [0, 4, 2]] = True
    own_image = torch.zeros(3, 5, dtype=torch.bool)
    own_image[[0, 1, 1, 2], [0, 1, 4, 3]] = True
    return {"t": unit(3, 4), "i": unit(3, 4, seed=1), "greedy": unit(3, 4, seed=2),
            "texts": unit(7, 4, seed=3), "images": unit(5, 4, seed=4),
            "own_text": own_text, "own_image": own_image}


def dot(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist()))


def soft_maximum(cosines, tau):
    return tau * math.log(sum(math.exp(cosine / tau) for cosine in cosines))


def looped(name, tau, t, i, greedy, texts, images, own_text, own_image):
    """The three rewards as the slides write them, one number at a time."""
    rewards = []
    for b in range(len(t)):
        cosine = dot(t[b], i[b])
        wrong_texts = [dot(texts[p], i[b]) for p in range(len(texts)) if not own_text[b, p]]
        wrong_images = [dot(t[b], images[q]) for q in range(len(images)) if not own_image[b, q]]
        if name == "similarity":
            rewards.append(cosine - dot(greedy[b], i[b]))
        else:
            reward = cosine - soft_maximum(wrong_texts, tau)
            if name == "bidirectional":
                reward += cosine - soft_maximum(wrong_images, tau)
            rewards.append(reward)
    return rewards


@parametrize("tau", [1., .1, .02])
@parametrize("name", m.REWARDS)
def test_rewards_equal_plain_loops(name, tau):
    want = looped(name, tau, **reward_case())
    got = m.REWARDS[name](**reward_case(), tau=tau)
    assert got.tolist() == approx(want, abs=1e-6)


def test_the_worked_example_of_section_1():
    texts = torch.tensor([[.30, .20], [.22, .28], [.26, .18]])  # cosines, if images are the axes
    images = torch.eye(2)
    case = {"t": texts[[0, 2]], "i": images[[0, 0]], "greedy": None, "texts": texts,
            "images": images, "tau": .01, "own_text": torch.eye(3).bool()[[0, 2]],
            "own_image": torch.eye(2).bool()[[0, 0]]}
    assert m.unidirectional_reward(**case).tolist() == approx([.0398, -.04], abs=5e-5)
    assert m.bidirectional_reward(**case).tolist() == approx([.1398, .04], abs=5e-5)


@parametrize("mask", ["own_text", "own_image"])
def test_a_caption_without_a_negative_is_an_error(mask):
    case = reward_case()
    case[mask][1] = True
    with raises(ValueError, match="needs a negative"):
        m.bidirectional_reward(**case, tau=.1)


def test_a_batch_of_one_image_has_no_baseline():
    with raises(ValueError, match="one image"):
        m.advantages(torch.ones(1), torch.ones(1))


# ==================================================================================================
# 2. Losses
# ==================================================================================================


def test_caption_log_prob_is_the_mean_cross_entropy_up_to_eos():
    # eos is 2. What follows the first is filler, whatever its id; a pad (0) before it counts.
    tokens = rows_of("3 4 2 2 2 2\n3 4 2 0 0 0\n3 0 5 2 7 2\n3 0 5 8 7 6")
    logits = torch.randn(1, 6, 9).repeat(4, 1, 1)
    got = m.caption_log_prob(logits, tokens, eos=2)
    for b, length in enumerate((3, 3, 4, 6)):
        want = -F.cross_entropy(logits[b, :length], tokens[b, :length])
        assert got[b].item() == approx(want.item(), abs=1e-6)
    with raises(ValueError, match="logits"):
        m.caption_log_prob(logits[:, :5], tokens, eos=2)


def test_policy_gradient_against_enumeration():
    """Over all captions, here three of one word, the loss has the gradient of the mean reward."""
    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)
    reward = torch.randn(3, dtype=torch.float64, requires_grad=True)
    p = weights.softmax(-1)
    true_gradient, = torch.autograd.grad((reward * p).sum(), weights, retain_graph=True)
    log_p = m.caption_log_prob(weights.expand(3, 1, 3), torch.tensor([[0], [1], [2]]), eos=9)
    loss = m.policy_gradient_loss(log_p, reward * p * 3)  # 3: the loss is a mean over captions
    got, to_reward = torch.autograd.grad(loss, (weights, reward), allow_unused=True)
    assert torch.allclose(-got, true_gradient, atol=1e-6)
    assert to_reward is None
    with raises(ValueError, match="one a caption"):
        m.policy_gradient_loss(log_p, reward[:, None])


# ==================================================================================================
# 3. Discriminator
# ==================================================================================================


def test_the_discriminator_has_the_papers_shape():
    shapes = [weight.shape for weight in m.Discriminator(512).parameters() if weight.dim() == 2]
    assert shapes == [(512, 1024), (256, 512), (2, 256)]


def test_the_grammar_network_sees_no_image():
    discriminator = m.Discriminator(8, sees_image=False)
    assert m.human_probability(discriminator, None, unit(4, 8)).shape == (4,)


# ==================================================================================================
# 4. One step
# ==================================================================================================

STEPS = {"full": (m.rl_step, {}),
         "without GT": (m.rl_step, {"reward": "similarity", "gt_in_pool": False}),
         "WTF alone": (m.wtf_step, {})}

# The losses of ten steps on frozen_case, once written down. In step 7 the captioner says a pad (0)
# in the middle of a caption, which counts; masked there, the full method's last four losses were
# .7000628, .8392659, .642817, 1.1881411.
RECORDED_LOSSES = {
    "full": "2.1103878 .3163072 -.0046164 2.0204046 1.5440594 .6968309 .6928304 .8394785 .7662568 "
            "1.0391139",
    "without GT": ".7362831 .1283702 .0055009 .9920914 .4929903 .3740338 .2243218 .3722331 "
                  ".1515576 .1694838",
    "WTF alone": "1.6246241 .5075341 .5425769 1.1360985 1.0221325 1.3249058 1.056959 .5911341 "
                 ".6695461 1.2685027",
    "discriminator": ".7046313 .6031411 .5375799 .5673978 .4999847 .6640055 .4899882 .5168336 "
                     ".4822697 .5260577"}


def recorded(name):
    return np.array(RECORDED_LOSSES[name].split(), float)


def frozen_weights(model):
    """The same numbers whatever the version of torch: each tensor by the checksum of its name."""
    for name, weight in model.named_parameters():
        draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(weight.shape)
        if weight.dim() > 1:
            draw *= 1.5 / math.sqrt(weight[0].numel())
        else:
            is_norm = "orm" in name or ".ln_" in name or name.startswith("ln_")
            draw = draw * .1 + (name.endswith("weight") and is_norm)
        weight.data.copy_(torch.from_numpy(np.asarray(draw)))
    return model


def clip_tokens(texts, context_length=80):
    """Words w00, w01, ... -> 3, 4, ..., between 1 and 63."""
    rows = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(rows, texts):
        numbers = [int(word[1:] or 0) + 3 for word in text.split()]
        ids = [1, *numbers, 63][:context_length]
        row[:len(ids)] = torch.tensor(ids)
    return rows


def frozen_case(dropout=0., family=m.BlipCaptioner):
    """A tiny BLIP, discriminator, CLIP, a bank of 24 images, some of equal ids; ten batches."""
    import open_clip
    blip = frozen_weights(small_blip(64, 32, bos=1, eos=2, dropout=dropout))
    tokenizer = m.word_tokenizer([f"w{k:02d}" for k in range(60)], 64)
    captioner = family(blip, tokenizer, None, max_new_tokens=12)
    clip_model = frozen_weights(open_clip.CLIP(**small_clip(80, 64)))
    clip = m.FrozenClip(clip_model, None, clip_tokens, "cpu")
    draw = np.random.RandomState(7)
    captions = []
    for _ in range(80):
        words = draw.randint(0, 59, draw.randint(4, 12))
        captions.append(" ".join(f"w{k:02d}" for k in words))
    pixels = torch.from_numpy(draw.standard_normal((24, 3, 32, 32))).float()
    emb = F.normalize(torch.from_numpy(draw.standard_normal((24, 24))).float(), dim=-1)
    k = torch.arange(24)
    bank = {"emb": emb, "ids": k // 2 * 2 + k % 3 // 2,
            "near": torch.stack([(k + 5) % 24, (k + 9) % 24], 1)}
    batches = []
    for _ in range(10):
        rows = torch.from_numpy(draw.permutation(24)[:6])
        texts = [captions[k] for k in draw.randint(0, 80, 6)]
        batches.append({"rows": rows, "pixels": pixels[rows], "captions": texts})
    return (captioner, frozen_weights(m.Discriminator(24)), clip, bank), batches


def check_ten_steps(name, step, **options):
    """A training loop of a few lines around `step` must give the recorded losses."""
    parts, batches = frozen_case()
    captioner, discriminator, *_ = parts
    optimizer = torch.optim.SGD([{"params": captioner.parameters(), "lr": .02},
                                 {"params": discriminator.parameters(), "lr": .1}])
    losses, d_losses = [], []
    for batch in batches:
        loss, d_loss, _ = step(batch, *parts, tau=.02, **options)
        loss.backward()
        losses.append(loss.item())
        if d_loss is not None:
            d_loss.backward()
            d_losses.append(d_loss.item())
        nn.utils.clip_grad_norm_(captioner.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
    assert losses == approx(recorded(name), rel=1e-5, abs=1e-5)
    if name == "full":
        assert d_losses == approx(recorded("discriminator"), rel=1e-5, abs=1e-5)


@parametrize("name", STEPS)
def test_ten_steps_give_the_recorded_losses(name):
    step, options = STEPS[name]
    check_ten_steps(name, step, **options)


def test_teacher_forcing_is_the_same_loss_with_reward_one():
    (captioner, *_), (batch, *_) = frozen_case()
    loss, d_loss, _ = m.tf_step(batch, captioner)
    gt = captioner.tokenize(batch["captions"])
    log_p = captioner.log_prob(captioner.encode(batch["pixels"]), gt)
    assert loss.item() == approx(-log_p.mean().item())
    assert d_loss is None
    assert captioner.training  # dropout is on


def test_pools_hold_what_the_paper_says():
    """Images in rows 0 and 3 of the bank, with neighbours in rows 2 and 1; 2 has the id of 3."""
    captions = unit(6, 6)  # own, greedy, GT, of both images
    bank = {"emb": unit(4, 6, seed=5), "ids": torch.tensor([7, 8, 9, 9]),
            "near": torch.tensor([[2], [0], [0], [1]])}
    texts, images, *own = m.reward_pools(*captions.split(2), torch.tensor([0, 3]), bank)
    own_policy, own_gt, own_image = [mask.int().tolist() for mask in own]
    assert torch.equal(texts, captions)
    assert torch.equal(images, bank["emb"])
    assert own_policy == [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert own_gt == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]
    assert own_image == [[1, 0, 0, 0], [0, 0, 1, 1]]
    with raises(ValueError, match="unit norm"):
        m.reward_pools(2 * captions[:2], None, None, torch.tensor([0, 3]), bank)


@parametrize("name, decode", [
    ("similarity", "beam"), ("unidirectional", "beam"), ("bidirectional", "beam"),
    ("bidirectional", "sample")])
@torch.no_grad()
def test_the_step_is_the_paper_spelled_out(name, decode):
    """Loss = -(r_policy log p_policy + .7 r_gt log p_gt), dropout off."""
    (captioner, discriminator, clip, bank), (batch, *_) = frozen_case(dropout=.4)
    captioner.train()
    torch.manual_seed(1)
    got, _, _ = m.rl_step(batch, captioner, discriminator, clip, bank, reward=name, tau=.05,
                          center_reward=False, wtf_weight=.7, decode=decode)

    captioner.eval()
    rows, states = batch["rows"], captioner.encode(batch["pixels"])
    torch.manual_seed(1)
    policy = captioner.generate(states, num_beams=5, sample=decode == "sample")
    greedy = captioner.generate(states)
    gt = captioner.tokenize(batch["captions"])
    said = captioner.detokenize(policy) + captioner.detokenize(greedy) + batch["captions"]
    texts, own_text = clip.encode_texts(said), torch.eye(18).bool()
    pool = list({*rows.tolist(), *bank["near"][rows].flatten().tolist()})
    i, own_image = bank["emb"][rows], bank["ids"][rows][:, None] == bank["ids"][pool]
    loss = 0.
    for mine, tokens, weight in ((slice(6), policy, 1.), (slice(12, 18), gt, .7)):
        r_sim = looped(name, .05, texts[mine], i, texts[6:12], texts, bank["emb"][pool],
                       own_text[mine], own_image)
        human = discriminator.net(torch.cat([i, texts[mine]], 1)).softmax(1)[:, 1]
        reward = .94 * torch.tensor(r_sim) + .06 * human
        loss -= weight * (reward * captioner.log_prob(states, tokens)).mean().item()
    assert got.item() == approx(loss, rel=1e-4, abs=1e-5)


def test_ground_truth_counts_three_times():
    parts, (batch, other, *_) = frozen_case()
    changed = batch | {"captions": other["captions"][:1] + batch["captions"][1:]}
    _, d_loss, info = m.rl_step(batch, *parts)
    _, other_d_loss, other_info = m.rl_step(changed, *parts)
    assert d_loss != other_d_loss  # 1. as examples for the discriminator
    assert info["r_policy"] != other_info["r_policy"]  # 2. in the pool of the reward
    loss, _, info = m.rl_step(batch, *parts, gt_in_pool=False)
    other_loss, _, other_info = m.rl_step(changed, *parts, gt_in_pool=False)
    assert info["r_policy"] == other_info["r_policy"]
    assert loss != other_loss  # 3. as a second trajectory


@parametrize("step", [m.rl_step, m.wtf_step])
def test_two_processes_make_the_step_of_one(step):
    """Each has a share of the batch; gather joins what both hold, in the order of the calls."""
    parts, (batch, *_) = frozen_case()
    joined = []

    def remember(x):
        joined.append(x)
        return x

    loss, *_ = step(batch, *parts, gather=remember)
    losses = []
    for rank in (0, 1):
        mine = slice(3 * rank, 3 * rank + 3)
        share = {name: value[mine] for name, value in batch.items()}
        calls = iter(joined)
        share_loss, *_ = step(share, *parts, gather=lambda x, calls=calls: next(calls), rank=rank)
        losses.append(share_loss.item())
    assert np.mean(losses) == approx(loss.item(), rel=1e-5)


# ==================================================================================================
# 5. Training
# ==================================================================================================


def test_the_learning_rate_rises_then_falls_to_a_tenth():
    rates = [m.learning_rate(step, 1000, 2., 10) for step in (0, 4, 9, 500, 1000)]
    assert rates == approx([.2, 1, 2, 1.1, .2], rel=1e-3)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with a toy world of 96 scenes, where distcap.py looks for it."""
    folder = tmp_path_factory.mktemp("workplace")
    m.write_world(folder / "data/toy-0", 0, counts=(64, 16, 16))
    return folder


def cider_alone(references, captions, with_spice=True):
    """In place of language_metrics: CIDEr of words between blanks, without Java."""
    from pycocoevalcap.cider.cider import Cider
    gt = dict(enumerate(references))
    cider, _ = Cider().compute_score(gt, {k: [text] for k, text in enumerate(captions)})
    return {"cider": float(cider)}, captions


@pytest.fixture
def quick(monkeypatch):
    """No Java, no picture, short training of CLIP and discriminator."""
    monkeypatch.setattr(m, "language_metrics", cider_alone)
    monkeypatch.setattr(m, "draw_report", lambda *_: None)
    short_clip = functools.partial(m.train_toy_clip, steps=5)
    monkeypatch.setattr(m, "train_toy_clip", short_clip)
    short_start = functools.partial(m.train_discriminator, steps=60)
    monkeypatch.setattr(m, "train_discriminator", short_start)


@pytest.fixture
def toy(quick, workplace, monkeypatch):
    """In the workplace, with the quick parts and a finished run, runs/toy. -> folder of runs"""
    monkeypatch.chdir(workplace)
    assert m.main(command("toy")) == 0
    return workplace / "runs"


def command(run, *flags):
    """A short `train`; a run that is finished prints its table at once."""
    short = ("train --batch-size 8 --num-beams 2 --tf-steps 7 --steps 6 --checkpoint-every 3 "
             "--eval-every 4 --run")
    return [*short.split(), f"runs/{run}", *flags]


def in_another_process(function):
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


def killed(place, argv):
    """Run distcap.py in a process that kill -9 ends at a place: "TF 5" or in the first save."""
    def die_in_log(run, stage, step, info):
        write_log(run, stage, step, info)
        if f"{stage} {step}" == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def die_in_save(captioner, folder, num_beams):
        folder.mkdir()
        os.kill(os.getpid(), signal.SIGKILL)

    def run():
        m.write_log = die_in_log
        if place == "save":
            m.ToyCaptioner.save = die_in_save
        m.main(argv)

    write_log = m.write_log
    process = in_another_process(run)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def log_of(run):
    """{(stage, step): what was logged}; steps that were made again count once."""
    log = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        log[entry.pop("stage"), entry.pop("step")] = entry
    return log


def same_file(name, a, b):
    return (a / name).read_bytes() == (b / name).read_bytes()


def furthest_weights(one, other):
    """The largest difference between the captioners of two runs."""
    a = load_file(one / "captioner/model.safetensors")
    b = load_file(other / "captioner/model.safetensors")
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@parametrize("decode", ["beam", "sample"])
def test_a_run_that_was_killed_goes_on_by_the_same_command(toy, decode):
    """Weights and captions are those of a run that was not killed, bit for bit."""
    whole, broken = "toy" if decode == "beam" else "sampled", f"killed-{decode}"
    assert m.main(command(whole, "--decode", decode)) == 0
    for place in ("TF 5", "save", "RL 5"):  # past a checkpoint, and with a part half written
        killed(place, command(broken, "--decode", decode))
    assert m.main(command(broken, "--decode", decode, "--workers", "2")) == 0
    for name in ("captions_tf.json", "captions.json", "metrics.json"):
        assert same_file(name, toy / whole, toy / broken), name
    assert furthest_weights(toy / whole, toy / broken) == 0
    assert log_of(toy / whole) == log_of(toy / broken)
    assert len(log_of(toy / whole)) == 7 + 6


def run_two_processes(script, argv):
    """The script by torchrun, without Java. -> what it prints"""
    quick = ("import distcap, test_distcap\n"
             "distcap.language_metrics = test_distcap.cider_alone\n")
    Path("script.py").write_text(quick + script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, "--", "script.py", *argv], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(PROGRAM.parent)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_killed_run_goes_on_with_two_processes(toy):
    """They make the steps that one process makes."""
    killed("RL 5", command("two"))
    said = run_two_processes("raise SystemExit(distcap.main())", command("two"))
    assert said.count("written: ") == 1  # one process speaks for both
    one_log, two_log = log_of(toy / "toy"), log_of(toy / "two")
    assert one_log.keys() == two_log.keys()
    for place, entry in one_log.items():
        assert entry == approx(two_log[place], rel=1e-4, abs=1e-6), place
    assert furthest_weights(toy / "toy", toy / "two") < 1e-4
    assert same_file("captions.json", toy / "toy", toy / "two")
    assert (toy / "two/report.png").exists()  # drawn here alone


def test_a_finished_run_prints_its_table_at_once(toy, capsys, monkeypatch):
    capsys.readouterr()
    monkeypatch.setattr(m, "setup_machine", None)  # would fail
    assert m.main(command("toy", "--workers", "3", "--cpu")) == 0
    assert re.search("best reference.*\nt2i_r1 ", capsys.readouterr().out)


def test_a_run_does_not_go_on_with_other_flags(toy, capsys):
    assert m.main(command("toy", "--lr", ".5", "--alpha", "1")) == 2
    error = capsys.readouterr().err
    assert "other flags" in error
    assert "lr" in error
    assert "alpha" in error
    assert "seed" not in error


def test_a_run_starts_from_another_ones_captioner(toy):
    start = "--captioner runs/toy/captioner_tf --clip runs/toy/clip --tf-steps 0"
    assert m.main(command("started", *start.split(), "--steps", "0")) == 0
    tf_captions = m.read_json(toy / "toy/captions_tf.json")
    assert m.read_json(toy / "started/captions.json") == tf_captions


# ==================================================================================================
# 6. Evaluation
# ==================================================================================================


def test_expected_recall_is_the_mean_over_all_orders_of_ties():
    scores = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (6, 6))).float()
    got = m.expected_recall(scores, torch.arange(6))
    for query in range(6):
        ranks = []
        for order in itertools.permutations(range(6)):
            candidates = sorted(order, key=scores[query].tolist().__getitem__, reverse=True)
            ranks.append(candidates.index(query) + 1)
        assert got["rank"][query].item() == approx(np.mean(ranks))
        for k in (1, 5, 10):
            recall = np.mean([rank <= k for rank in ranks])
            assert got[f"r{k}"][query].item() == approx(recall)
    with raises(ValueError, match="NaN"):
        m.expected_recall(torch.tensor([[.1, float("nan")]]), torch.tensor([0]))


def test_retrieval_against_argsort():
    """Blocks, lengths of vectors and NumPy make no difference."""
    i = unit(50, 16)
    t = F.normalize(i + 1.2 * unit(50, 16, seed=1), dim=1)
    metrics, ranks = m.retrieval(t.double().numpy(), 3 * i, block=7)
    for way, cosine in (("i2t", i @ t.T), ("t2i", t @ i.T)):
        order = cosine.argsort(descending=True).tolist()
        places = [order[n].index(n) + 1 for n in range(50)]
        for k in (1, 5, 10):
            recall = np.mean([place <= k for place in places])
            assert metrics[f"{way}_r{k}"] == approx(recall)
    assert ranks.tolist() == places
    with raises(ValueError, match="250 captions for 50 images"):
        m.retrieval(unit(250, 16), i)


def count_grams(words, n):
    return Counter(tuple(words[k:k + n]) for k in range(len(words) - n + 1))


def slow_self_bleu(captions):
    """BLEU-5 with smoothing method 1 of each caption against the others, quadratic."""
    scores = []
    for own, caption in enumerate(captions):
        words = caption.split()
        others = [other.split() for k, other in enumerate(captions) if k != own]
        score = 1.
        for n in range(1, 6):
            largest = Counter()  # of each n-gram in any of the others
            for other in others:
                largest |= count_grams(other, n)
            hits = (count_grams(words, n) & largest).total()
            if n == 1 and hits == 0:
                score = 0.
            score *= (max(hits, .1) / max(1, len(words) - n + 1)) ** .2
        _, closest = min((abs(len(other) - len(words)), len(other)) for other in others)
        if closest > len(words) > 0:
            score *= math.exp(1 - closest / len(words))
        scores.append(score)
    return sum(scores) / len(scores)


def test_self_bleu():
    rng = random.Random(1)
    captions = ["z z z", "a b c d a b", "a b c d a b"]
    for length in (0, 1, 3, 5, 7, 7, 9, 12, 12, 20):
        captions.append(" ".join(rng.choices("abcd", k=length)))
    for some in (captions, ["a b c d e", "a b c d", "a b c d e f"], ["a cat", "a cat"]):
        assert m.self_bleu(some) == approx(slow_self_bleu(some), abs=1e-12)
    assert m.self_bleu(["a"]) is None


def test_diversity():
    got = m.diversity(["a b", "a b", "a c d"])
    del got["self_bleu"]
    assert got == {"distinct1": 4 / 7, "distinct2": 3 / 4, "vocabulary": 4, "length": 7 / 3,
                   "duplicates": 2 / 3}


def test_clip_score_is_that_of_hessel_et_al(tiny):
    """2.5 max(0, cos) of prefix + caption, full stops kept: of cosines 1 and -1 it is 1.25."""
    clip = m.load_clip(str(tiny / "clip"), "", "cpu")
    cat, dogs = clip.encode_texts(["A photo of A red cat.", "A photo of two dogs."], remove="")
    i = torch.stack([cat, -dogs])
    metrics = m.clip_metrics(["A red cat.", "two dogs."], clip, i, "A photo of ")
    assert metrics["clip_score"] == approx(1.25)


# Caption / references; the last caption is empty.
GOLD_TEXT = """
A man riding a wave on a surfboard in the ocean. / A man riding a wave on top of a surfboard. /
A surfer in a black wetsuit rides a large wave. / Man surfing on a big blue wave in the ocean /
a person on a surf board riding a wave / The surfer is crouching low as the wave breaks behind
him.

Two dogs playing with a frisbee in a field / Two dogs are playing with a red frisbee in the
grass. / A brown dog and a white dog chase a frisbee / Dogs running across a green lawn after a
toy. / two dogs play tug-of-war with a frisbee / A pair of dogs, one brown and one white,
playing outside.

A kitchen with white cabinets and a stove. / A kitchen with a stove, a refrigerator and a sink.
/ An empty kitchen with white cabinets and a wooden floor. / The small kitchen has stainless
steel appliances. / a white kitchen with a window over the sink / A clean kitchen is shown with
a black stove top oven.

A woman walking down a street holding an umbrella. / A woman holding a pink umbrella while
walking in the rain. / A lady walks down the street with an umbrella. / woman with umbrella
crossing a wet street / A person wearing a raincoat holds a pink umbrella. / The woman is
walking on a rainy day under her umbrella.

/ Two dogs run on the beach."""
CAPTIONS, REFERENCES = [], []
for paragraph in GOLD_TEXT.strip().split("\n\n"):
    first, *rest = re.split(" ?/ ", " ".join(paragraph.split()))
    CAPTIONS.append(first)
    REFERENCES.append(rest)
# What pycocoevalcap 1.2's own wrappers printed for them (PTBTokenizer, Bleu, Meteor, Rouge, Cider;
# Spice for the first four).
GOLD = {"bleu1": .849987, "bleu2": .719397, "bleu3": .571932, "bleu4": .445030, "meteor": .323570,
        "rouge_l": .543328, "cider": 1.385488}
SPICE_OF_FOUR = .295481


@pytest.mark.filterwarnings("ignore:SPICE needs")
def test_golden_metrics_in_a_german_locale_with_a_java_that_fails(tmp_path, monkeypatch):
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if shutil.which("localedef"):  # where the locale is not installed
        subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"])
        monkeypatch.setenv("LOCPATH", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    before = dict(os.environ)
    got, _ = m.language_metrics(REFERENCES, CAPTIONS)
    assert {name: got[name] for name in GOLD} == approx(GOLD, abs=6e-7)
    assert os.environ == before


def test_odd_captions_shift_no_other_and_a_dead_meteor_costs_meteor_only(monkeypatch):
    from pycocoevalcap.meteor.meteor import Meteor

    def start_and_die(self):
        start(self)
        self.meteor_p.kill()

    start = Meteor.__init__
    monkeypatch.setattr(Meteor, "__init__", start_and_die)
    cases = {"A man's hat isn't there.": "a man 's hat is n't there",
             "a\u2028b\vc\rd\x85e\n": "a b c d e", "A ||| b": "a b", " ": "",
             "Un caf\u00e9 \U0001f431 \u00bd \u20ac5": "un caf\u00e9 1/2 $ 5", "": "",
             "Two dogs, one red.": "two dogs one red"}
    references = [[text or "nothing"] for text in cases.values()]
    signal.alarm(60)  # in place of a hang
    with pytest.warns(UserWarning, match="METEOR failed"):
        metrics, tokens = m.language_metrics(references, list(cases), with_spice=False)
    signal.alarm(0)
    assert tokens == list(cases.values())
    assert metrics["meteor"] is None


def test_spice_has_the_published_total():
    """The golden total is that of pycocoevalcap's own Spice class on Java 11."""
    import pycocoevalcap
    core = Path(pycocoevalcap.__path__[0], "spice/lib/stanford-corenlp-3.6.0-models.jar")
    if not core.exists():
        pytest.skip("no CoreNLP here; `make spice` fetches it")
    metrics, _ = m.language_metrics(REFERENCES[:4], CAPTIONS[:4])
    assert metrics["spice"] == approx(SPICE_OF_FOUR, abs=6e-4)


# ==================================================================================================
# 7. CLIP
# ==================================================================================================


def change_weights(path, change):
    """Apply change(weights) to a file of weights."""
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@parametrize("spoil", [
    lambda file: file.rename(file.parent / "epoch_10.pt"),
    lambda file: change_weights(file, lambda weights: weights.pop("text_projection")),
    lambda file: os.truncate(file, 9999)])
def test_a_clip_without_its_weights_is_refused(tiny, tmp_path, spoil):
    folder = shutil.copytree(tiny / "clip", tmp_path / "clip")
    spoil(folder / "open_clip_model.safetensors")
    with raises(Exception, match=r"."):  # open_clip's, torch's or safetensors' own
        m.load_clip(str(folder), "", "cpu")


@parametrize("value", [0., math.nan])
def test_a_clip_of_zeros_or_nan_is_refused(tiny, tmp_path, value):
    folder = shutil.copytree(tiny / "clip", tmp_path / "clip")
    file = folder / "open_clip_model.safetensors"
    change_weights(file, lambda weights: weights["text_projection"].fill_(value))
    with raises(m.UserError, match="broken"):
        m.load_clip(str(folder), "", "cpu")


def test_captions_that_clip_cuts_earn_one_warning(tiny):
    clip = m.load_clip(str(tiny / "clip"), "", "cpu")
    long = "a wide view of a place " * 17
    with pytest.warns(UserWarning, match="77 tokens") as caught:
        red, blue = clip.encode_texts([f"{long} red", f"{long} blue"])
    assert len(caught) == 1
    assert torch.equal(red, blue)


# ==================================================================================================
# 8. Captioners
# ==================================================================================================


def test_tokens_go_there_and_back():
    (captioner, *_), _ = frozen_case()
    tokens = captioner.tokenize(["w07 w59", "w00"])
    assert tokens.tolist() == [[1, 11, 63, 2], [1, 4, 2, 0]]
    assert captioner.detokenize(tokens) == ["w07 w59", "w00"]
    assert captioner.tokenize(["w01 " * 500])[0].tolist() == [1, *[5] * 62, 2]


def test_an_apostrophe_stands_between_its_letters(tiny):
    captioner = m.load_captioner(str(tiny / "blip"))
    ids = captioner.tokenizer.convert_tokens_to_ids(["[DEC]", "a", "man", "'", "s", "cap", "[SEP]"])
    assert captioner.detokenize(torch.tensor([ids])) == ["a man's cap"]


def looks_ahead(captioner):
    logits = captioner.logits
    captioner.logits = lambda states, tokens: logits(states, tokens) * (
        1 + tokens[:, -1:, None] / 99)


def is_told(**options):
    """A change after which transformers' search is told more than it should be."""
    def change(captioner):
        plain = captioner.search_options
        captioner.search_options = lambda *how, **more: plain(*how, **more) | options
    return change


@parametrize("change, message", [
    (looks_ahead, "later word"), (is_told(top_k=5), "drawn from p"),
    (is_told(forced_eos_token_id=2), "drawn from p")])
def test_check_captioner_passes_blip_and_catches_faults(change, message):
    (captioner, *_), (batch, *_) = frozen_case()
    captioner.max_new_tokens = 4
    m.check_captioner(captioner, batch["pixels"])
    change(captioner)
    with raises(AssertionError, match=message):
        m.check_captioner(captioner, batch["pixels"])


def test_check_captioner_passes_the_toy_captioner():
    captioner = m.toy_captioner([{"captions": ["a red circle", "two shapes"]}])
    m.check_captioner(captioner, torch.randn(4, 3, 48, 48))


class RunsCode(str):
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def test_pickled_code_does_not_run(tiny, tmp_path):
    folder = shutil.copytree(tiny / "blip", tmp_path / "blip")
    (folder / "model.safetensors").unlink()
    code = RunsCode(folder / "ran")
    torch.save(code, folder / "pytorch_model.bin")
    torch.save(code, folder / "checkpoint.pt")
    with raises(Exception, match="safetensors"):
        m.load_captioner(str(folder))
    with raises(Exception, match="weights_only"):
        m.load_checkpoint(folder, "RL", {})
    assert not (folder / "ran").exists()


def test_a_blip_that_lacks_a_weight_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny / "blip", tmp_path / "blip")
    name = "vision_model.post_layernorm.bias"
    change_weights(folder / "model.safetensors", lambda weights: weights.pop(name))
    with raises(m.UserError, match=name):
        m.load_captioner(str(folder))


@torch.no_grad()
def test_a_folder_as_todays_libraries_write_it(tiny, tmp_path):
    """Several files, bfloat16, one processor; float32 here, or a step of 1e-6 from 1 were none."""
    from transformers import BlipForConditionalGeneration, BlipProcessor
    model = BlipForConditionalGeneration.from_pretrained(tiny / "blip").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    BlipProcessor(image_processor(48), bert_tokenizer()).save_pretrained(tmp_path)
    captioner = m.load_captioner(str(tmp_path))
    assert not captioner.training
    assert {weight.dtype for weight in captioner.parameters()} == {torch.float32}
    tokens, pixels = captioner.tokenize(["cap 1"]), torch.randn(1, 3, 48, 48)
    theirs = model.float().eval()(pixel_values=pixels, input_ids=tokens)
    ours = captioner.logits(captioner.encode(pixels), tokens)
    torch.testing.assert_close(ours, theirs.logits[:, :-1])


# ==================================================================================================
# 9. Data
# ==================================================================================================


def test_the_formats_of_coco_and_karpathy_agree(photos):
    edit(photos / "k.json", lambda data: data["images"][2].update(split="restval"))
    want = m.load_data([photos / "k.json"], [photos / "img"])
    assert [len(items) for items in want.values()] == [8, 2, 2]
    assert want["val"][1] == {"image_id": 9, "file": f"{photos}/img/9.bmp",
                              "captions": ["cap 9", "same text"]}
    coco = """{"images": [{"id": 8, "file_name": "8.bmp"}, {"id": 9, "file_name": "9.bmp"}],
        "annotations": [{"id": 1, "image_id": 8, "caption": "cap  8"},
                        {"id": 2, "image_id": 9, "caption": "cap 9"},
                        {"id": 3, "image_id": 8, "caption": " same text"},
                        {"id": 4, "image_id": 9, "caption": "same text"}]}"""
    for name, split in (("captions_val2017", "val"), ("latest", "test"), ("train", "train")):
        (photos / f"{name}.json").write_text(coco, "utf-8-sig")  # with a byte-order mark
        splits = m.load_data([photos / f"{name}.json"], [photos / "img"])
        assert splits[split] == want["val"]


@parametrize("change, message", [
    ('{"sentences": [{"raw": ["a", "b"]}]}', "image 3 "),
    ('{"sentences": [{"raw": null}]}', "image 3 "),
    ('{"sentences": [{"raw": NaN}]}', "image 3 "),
    ('{"sentences": [{"raw": " "}]}', "image 3 "),
    ('{"sentences": []}', "image 3 "),
    ('{"imgid": 11}', "11 "),  # as an image of another split
    ('{"filename": "11.bmp"}', "11.bmp"),
    ('{"filename": "no.bmp"}', "1 of 12 pictures .*no.bmp")])
def test_odd_data_is_refused(photos, change, message):
    edit(photos / "k.json", lambda data: data["images"][3].update(json.loads(change)))
    with raises(m.UserError, match=f"k.json.*{message}"):
        m.load_data([photos / "k.json"], [photos / "img"])


@parametrize("results, message", [
    ('[{"image_id": 5, "caption": "x"}]', "5 is unknown"),
    ('[{"image_id": "1", "caption": "x"}]', "'1' is unknown"),
    ('[{"image_id": 1, "caption": "x"}, {"image_id": 1, "caption": "y"}]', "1 must have one"),
    ('[{"image_id": 1, "caption": ["x"]}]', "1 must have one")])
def test_odd_predictions_are_refused(tmp_path, results, message):
    (tmp_path / "p.json").write_text(results)
    with raises(m.UserError, match=f"p.json.*{message}"):
        m.load_predictions(tmp_path / "p.json", [{"image_id": 1}])


def test_pictures_stand_upright_in_rgb(tmp_path):
    quarter_turn = Image.Exif()
    quarter_turn[0x0112] = 6
    Image.new("CMYK", (4, 6), (0, 255, 255, 0)).save(tmp_path / "x.jpg", exif=quarter_turn)
    got = m.open_image(tmp_path / "x.jpg")
    assert (got.mode, got.size) == ("RGB", (6, 4))
    assert got.getpixel((0, 0)) == approx((255, 0, 0), abs=3)


@parametrize("workers", [0, 2])
def test_a_damaged_picture_is_named(photos, tiny, workers):
    clip = m.load_clip(str(tiny / "clip"), "", "cpu")
    items = m.load_data([photos / "k.json"], [photos / "img"])["train"]
    os.truncate(photos / "img/7.bmp", 200)
    with raises(OSError, match="img/7.bmp"):
        m.embed_images(clip, items, workers)


def test_reading_processes_keep_few_files_open(photos):
    """A tensor that leaves a process takes a file, and 256 is the limit of some machines."""
    items = 120 * m.load_data([photos / "k.json"], [photos / "img"])["train"]

    def read():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        images = m.CaptionImages(items, functools.partial(m.square_pixels, side=8))
        batches = m.load_batches(images, m.batch_plan(items, 48, 0, 20), "cpu", workers=4)
        sys.exit(len(list(batches)) != 20)

    process = in_another_process(read)
    process.join(timeout=60)
    assert process.exitcode == 0


def test_the_first_of_two_equal_folders_stays(tmp_path):
    with m.whole(tmp_path / "x") as name:
        name.mkdir()
        (tmp_path / "x").mkdir()  # by another process
        (tmp_path / "x/first").touch()
    assert os.listdir(tmp_path / "x") == ["first"]


def test_mined_neighbours_against_argsort():
    emb, ids = unit(40, 8), torch.arange(40) // 2
    got = m.mine_neighbours(emb, ids, k=2, skip=3, block=7)
    for n in range(40):
        nearest = (emb @ emb[n]).argsort(descending=True)
        others = [row for row in nearest.tolist() if ids[row] != ids[n]]
        assert got[n].tolist() == others[3:5]


def test_an_epoch_visits_every_image_once():
    items = 10 * [{"captions": ["a"] * 5}] + [{"captions": ["a"]}]
    plan = m.batch_plan(items, 4, seed=3, batches=110)
    picks = sum(plan, [])
    for start in range(0, 440, 11):
        assert {row for row, _ in picks[start:start + 11]} == set(range(11))
    assert len(set(picks)) == 10 * 5 + 1  # with every caption at one time or another
    assert m.batch_plan(items, 4, 3, 5) == plan[:5]


# ==================================================================================================
# 10. Commands
# ==================================================================================================


def test_a_broken_caption_has_one_fault_of_grammar():
    rng = random.Random(0)
    seen = {m.broken("a b c", "x", rng) for _ in range(400)}
    repeat = {"a a b c", "a b b c", "a b c c"}
    remove = {"b c", "a c", "a b"}
    insert = {"x a b c", "a x b c", "a b x c"}
    swap = {"a b c", "b a c", "c b a", "a c b"}
    assert seen == repeat | remove | insert | swap


def test_predictions_are_scored_where_there_are_some(photos, quick, capsys, monkeypatch):
    edit(photos / "k.json", lambda data: data["images"][3].update(scene="street"))  # not ours
    (photos / "captions_t0.5.json").write_text(
        '[{"image_id": 3, "caption": "cap 3"}, {"image_id": 5, "caption": ""}]')
    argv = f"eval --predictions {photos}/captions_t0.5.json --annotations {photos}/k.json --split"
    assert m.main([*argv.split(), "train"]) == 0
    assert "captions_t0.5.json: 2 of 8 images" in capsys.readouterr().out
    metrics = m.read_json(photos / "captions_t0.5.metrics.json")
    assert metrics["images"] == 2
    assert metrics["cider"] > 0

    def full_disk(*_):
        raise OSError("no space")

    monkeypatch.setattr(m, "write_json", full_disk)
    assert m.main([*argv.split(), "train"]) == 2
    assert re.search(r"\ncider +\d", capsys.readouterr().out)


def test_real_models_go_through_train_eval_and_caption(photos, tiny, quick, monkeypatch, capsys):
    """Afterwards transformers alone says what captions.json says."""
    from transformers import BlipForConditionalGeneration, BlipProcessor
    before = dict(os.environ)
    monkeypatch.chdir(photos)
    assert m.main(f"train --annotations k.json --images img --captioner {tiny}/blip --clip "
                  f"{tiny}/clip --tf-steps 2 --steps 2 --batch-size 4 --num-beams 2 --workers 0 "
                  "--run run".split()) == 0
    model = BlipForConditionalGeneration.from_pretrained("run/captioner").eval()
    processor = BlipProcessor.from_pretrained("run/captioner")
    pixels = processor(images=[Image.open(f"img/{k}.bmp") for k in (10, 11)], return_tensors="pt")
    tokens = model.generate(**pixels, generation_config=model.generation_config)
    theirs = processor.batch_decode(tokens[:, 1:], skip_special_tokens=True,
                                    clean_up_tokenization_spaces=True)
    ours = [entry["caption"] for entry in m.read_json("run/captions.json")]
    assert ours == [text.strip() for text in theirs]
    metrics = Path("run/metrics.json").read_text()
    monkeypatch.chdir("/")
    assert m.main(["eval", "--run", f"{photos}/run"]) == 0
    assert (photos / "run/metrics.json").read_text() == metrics
    assert m.main(["caption", f"{photos}/img/11.bmp", "--run", f"{photos}/run"]) == 0
    assert f"img/11.bmp: {ours[1]}\n" in capsys.readouterr().out
    assert os.environ == before


def test_a_loaded_captioner_says_what_captions_json_says(toy):
    """One picture at a time too, and nothing in it moves."""
    captioner = m.load_captioner("runs/toy/captioner")
    for entry in m.read_json("runs/toy/captions.json"):
        image = m.open_image(f"data/toy-0/images/{entry['image_id']:05d}.png")
        states = captioner.encode(captioner.preprocess(image)[None])
        tokens = captioner.generate(states, num_beams=2)
        assert captioner.detokenize(tokens) == [entry["caption"]]


# ==================================================================================================
# 11. Command line
# ==================================================================================================


@parametrize("flags", [
    "--images mine", "--annotations a.json", "--batch-size 1", "--alpha 1.5", "--tau -1",
    "--rl-weight 0 --wtf-weight 0"])
def test_flags_that_would_do_something_else_are_refused(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert m.main(["train", *flags.split()]) == 2
    assert not os.listdir()


def start_script(folder, *args, **environment):
    return subprocess.Popen([sys.executable, PROGRAM, *args], cwd=folder, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | environment)


def test_a_script_uses_no_library_from_the_current_folder_and_prints_any_letter(photos):
    (photos / "pycocoevalcap.py").write_text("raise SystemExit('the wrong one')")
    m.write_json(photos / "\u0142.json", [{"image_id": 10, "caption": "cap 10"}])
    script = start_script(photos, "eval", "--annotations", "k.json", "--predictions",
                          "\u0142.json", PYTHONIOENCODING="cp1252")
    said, error = script.communicate()
    assert script.returncode == 0, error
    assert b"?.json: 1 of 2 images" in said


def test_a_reader_that_goes_leaves_no_stack_trace(tmp_path):
    m.write_json(tmp_path / "run/metrics.json", {"t2i_r1": .5})
    script = start_script(tmp_path, "compare", "run")
    script.stdout.close()
    assert b"Traceback" not in script.stderr.read()


def test_ctrl_c_during_imports_leaves_no_stack_trace(tmp_path):
    script = start_script(tmp_path, "compare", "run")
    while "torch" not in Path(f"/proc/{script.pid}/maps").read_text():
        time.sleep(.01)
    script.send_signal(signal.SIGINT)
    assert script.stderr.read() == b""


# ==================================================================================================
# Appendix A. The toy world
# ==================================================================================================

SCENE = json.loads("""{"layout": "vertical", "ground": "gray", "objects": [
    {"size": "small", "color": "red", "shape": "circle"},
    {"size": "large", "color": "blue", "shape": "cross"}]}""")


@parametrize("caption, held, stated", [
    ("two shapes", 0, 0), ("i see two shapes on a gray background", 1, 1),
    ("a red circle above a blue cross", 5, 5), ("a blue cross below a red circle", 5, 5),
    ("a blue cross above a red circle", 4, 5), ("a red cross and a blue circle", 2, 4),
    ("a tiny red circle over a huge blue cross on a black background", 7, 8),
    ("a shape left of a shape", 0, 1)])
def test_facts_counted_by_hand(caption, held, stated):
    metrics, good = m.oracle_metrics([caption], [SCENE])
    assert metrics["facts"] == stated
    assert metrics["true"] == held / max(1, stated)
    assert good.tolist() == [held == stated]


def test_the_oracle_tells_images_apart_by_facts_alone():
    captions = ["a red circle above a blue cross", "word salad"]
    metrics, good = m.oracle_metrics(captions, [SCENE, SCENE])
    assert metrics == {"well_formed": .5, "true": 1., "facts": 2.5, "oracle_r1": .5}
    assert good.tolist() == [True, False]
    captions = ["two shapes on a gray background", "a cross and a circle"]  # the second fits both
    metrics, _ = m.oracle_metrics(captions, [SCENE, SCENE | {"ground": "white"}])
    assert metrics["oracle_r1"] == .75
    for text in ("a red red circle", "a circle red", "two shapes on", "a red circle above", ""):
        assert m.parse_caption(text) is None


def test_limits_are_the_best_reference_and_all_facts():
    captions = ["two shapes", "a red circle and a cross", "a cross and a circle"]
    best, everything = m.toy_limits([{"scene": SCENE, "captions": captions}]).values()
    assert best == ["a red circle and a cross"]
    metrics, _ = m.oracle_metrics(everything, [SCENE])
    assert (metrics["facts"], metrics["true"]) == (8, 1.)


def test_writers_tell_the_truth_within_their_budget():
    rng = random.Random(0)
    scenes, = m.invent_scenes((1000,), rng)
    captions = [m.describe(scene, rng) for scene in scenes]
    facts = Counter(8 - m.parse_caption(caption).count("") for caption in captions)
    assert set(facts) == {0, 1, 4, 5, 6, 7}  # nobody says all eight
    assert 70 < facts[0] + facts[1] < 130  # a tenth is shy
    _, good = m.oracle_metrics(captions, scenes)
    assert good.all()


def test_twins_differ_in_sizes_alone_and_stay_in_one_split():
    plans = []
    for scenes in m.invent_scenes((80, 40, 8), random.Random(0)):
        for k in range(0, len(scenes), 4):
            twins = {json.dumps(scene) for scene in scenes[k:k + 4]}
            assert len(twins) == 4
            plan, = {re.sub("small|large", "", twin) for twin in twins}
            plans.append(plan)
    assert len(set(plans)) == len(plans) == 32


def test_pycocotools_reads_the_toy_world(workplace):
    from pycocotools.coco import COCO
    coco = COCO(workplace / "data/toy-0/captions_val.json")
    assert coco.getImgIds() == list(range(65, 81))
    notes = coco.loadAnns(coco.getAnnIds(imgIds=70))
    assert [note["image_id"] for note in notes] == [70] * 5


# ==================================================================================================
# Appendix B. OFA
# ==================================================================================================


OFA_SMALL = {"model_type": "ofa", "vocab_size": 101, "d_model": 32, "encoder_layers": 2,
             "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "resnet_type": "resnet50",
             "max_position_embeddings": 64, "token_bucket_size": 8, "image_bucket_size": 6,
             "dropout": 0.0, "image_size": 64}
# Two images with questions of 12 and of 8 tokens. What the original makes of them:
OFA_QUESTIONS = ["0 17 42 5 63 80 9 24 11 71 33 2", "0 17 42 5 63 80 9 2"]
OFA_TOKENS = rows_of("0 10 35 28 15 10 41 77 90 6 52 2\n0 55 82 98 11 29 4 2 1 1 1 1")
OFA_LOGITS = {0: -1.931303641, 441: 0.5541735233, 1322: 1.19044566, 2423: -0.3607906147}
OFA_GREEDY = "0 94 92 75 52 21 75 39 5 39 5 82 2"  # of the second
OFA_BEAMS = "0 94 92 75 5 39 5 82 5 51 5 39 2"


def small_ofa(**changes):
    """The original's weights: numpy's frozen stream, seeded by an entry's name, scaled by kind."""
    captioner = m.OFACaptioner(OFA_SMALL | changes, lambda text: {"input_ids": [0, 2]})
    for name, weight in captioner.state_dict().items():
        if weight.is_floating_point():
            draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(weight.shape)
            if weight.dim() > 1:
                draw /= math.sqrt(weight[0].numel())
            elif name.endswith("running_var"):
                draw = 1 + .1 * abs(draw)
            elif not name.endswith((".weight", "c_attn")):
                draw *= .1
            weight.copy_(torch.from_numpy(draw).float())
    noise = np.random.RandomState(zlib.crc32(b"patch_images")).standard_normal((2, 3, 64, 64))
    return captioner, torch.from_numpy(.5 * noise).float()


def ofa_logits(captioner, pixels):
    """Logits of OFA_TOKENS behind either question, which differ in length. -> (2,12,V)"""
    logits = []
    for b in (0, 1):
        captioner.question = rows_of(OFA_QUESTIONS[b])[0]
        tokens = F.pad(OFA_TOKENS[b:b + 1], (0, 1))
        logits.append(captioner.logits(captioner.encode(pixels[b:b + 1]), tokens))
    return torch.cat(logits)


@parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@torch.no_grad()
def test_ofa_equals_the_original(dtype, tolerance):
    captioner, images = small_ofa()
    captioner.to(dtype).eval().max_new_tokens = 12
    images = images.to(dtype)
    logits = ofa_logits(captioner, images).flatten()
    for place, value in OFA_LOGITS.items():
        assert logits[place].item() == approx(value, abs=tolerance)
    states = captioner.encode(images[1:])
    assert captioner.generate(states).equal(rows_of(OFA_GREEDY))
    assert captioner.generate(states, num_beams=5).equal(rows_of(OFA_BEAMS))


def test_ofa_has_the_gradients_of_the_original(monkeypatch):
    """The original's were taken with live BatchNorm over the two images."""
    monkeypatch.setattr("torchvision.ops.FrozenBatchNorm2d", nn.BatchNorm2d)
    captioner, images = small_ofa()
    trunk = captioner.double().train().encoder.embed_images
    grids = trunk(images.double())
    monkeypatch.setattr(type(trunk), "forward", lambda self, grid: grid)
    logits, targets = ofa_logits(captioner, grids)[:, :-1], OFA_TOKENS[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=1)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(captioner.parameters(), math.inf)
    assert loss.item() == approx(5.274559924, abs=1e-8)
    assert norm.item() == approx(76.00788816, rel=2e-6)


def test_ofa_tiny_has_the_papers_size():
    tiny = {"vocab_size": 59457, "d_model": 256, "encoder_layers": 4, "encoder_attention_heads": 4,
            "encoder_ffn_dim": 1024, "max_position_embeddings": 1024, "token_bucket_size": 256,
            "image_bucket_size": 42}
    captioner = m.OFACaptioner(OFA_SMALL | tiny, lambda text: {"input_ids": [0, 2]})
    size = sum(weight.numel() for name, weight in captioner.state_dict().items()
               if "running" not in name)
    # Left out: the decoder's positions, bias tables and two LayerNorms for drawing images.
    drawing = (42 ** 2 + 1) * 256 + 4 * (83 ** 2 + 3) * 4 + 4 * 256
    assert size + drawing == 33_488_336


def test_ofa_freezes_batchnorm_and_decodes_without_dropout():
    captioner, images = small_ofa(dropout=.5)
    trunk = captioner.train().encoder.embed_images
    assert torch.allclose(trunk(images)[:1], trunk(images[:1]), atol=1e-4)
    states = captioner.encode(images)
    assert captioner.generate(states).equal(captioner.generate(states))


def test_ofa_saves_loads_and_tokenizes_like_the_original(tmp_path):
    """The question begins with a blank, captions do not; codes of images are no text."""
    from tokenizers import ByteLevelBPETokenizer
    text = "A man, riding a horse."
    bpe, special = ByteLevelBPETokenizer(), ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator([f"{text} what does the image describe?"], min_frequency=1,
                            special_tokens=special)
    bpe.save_model(str(tmp_path))
    config = OFA_SMALL | {"vocab_size": 700}
    m.write_json(tmp_path / "config.json", config)
    state = m.OFACaptioner(config, lambda text: {"input_ids": [0, 2]}).state_dict()
    # Published files hold more than captions need, and one matrix under three names.
    more = {"decoder.output_projection.weight": state["encoder.embed_tokens.weight"],
            "encoder.token_rp_bucket": torch.zeros(9), "decoder.image_pos_ln.bias": torch.zeros(9)}
    torch.save(state | more, tmp_path / "pytorch_model.bin")
    captioner = m.load_captioner(str(tmp_path))
    m.check_captioner(captioner, torch.randn(2, 3, 64, 64))
    captioner.save(tmp_path / "again", 5)
    for one in (captioner, m.load_captioner(str(tmp_path / "again"))):
        for name, weight in one.state_dict().items():
            assert torch.equal(weight, state[name])
        tokens, pieces = one.tokenize([text]), one.tokenizer.convert_ids_to_tokens
        assert " ".join(pieces(one.question)) == (
            "<s> \u0120what \u0120does \u0120the \u0120image \u0120describe ? </s>")
        assert " ".join(pieces(tokens[0])) == (
            "<s> A \u0120man , \u0120riding \u0120a \u0120horse . </s>")
        assert one.detokenize(F.pad(tokens, (0, 1), value=699)) == [text]


# ==================================================================================================
# Appendix C. BLIP's attention, against the released way of working
# ==================================================================================================


class AsReleased(m.Captioner):
    """The image encoder runs for each of beam, greedy, GT and policy; GT has 255 tokens."""

    def __init__(self, model, tokenizer, image_processor, max_new_tokens=50):
        from transformers import GenerationConfig
        super().__init__(tokenizer, [1], 2, 0, 512, max_new_tokens=max_new_tokens)
        model.text_decoder.generation_config = GenerationConfig()
        self.model = model

    def encode(self, pixels):
        return pixels

    @torch.no_grad()
    def generate(self, pixels, num_beams=1):
        return self.model.text_decoder.generate(
            torch.ones(len(pixels), 1, dtype=torch.long),
            encoder_hidden_states=self.model.vision_model(pixels)[0],
            **self.search_options(num_beams))

    def tokenize(self, captions):
        tokens = super().tokenize(captions)
        length = min(255, self.model.config.text_config.max_position_embeddings)
        return F.pad(tokens, (0, length - tokens.shape[1]))

    def logits(self, pixels, tokens):
        states = self.model.vision_model(pixels)[0]
        return self.model.text_decoder(tokens, encoder_hidden_states=states).logits[:, :-1]


def base_case(family):
    """As frozen_case, of BLIP-base's size on random weights, with one batch of 8."""
    import open_clip
    from transformers import BlipConfig, BlipForConditionalGeneration
    numbers = torch.randint(30520, (8, 11)).tolist()
    captions = [" ".join(f"w{k}" for k in row) for row in numbers]
    batch = {"rows": torch.arange(8), "captions": captions, "pixels": torch.randn(8, 3, 384, 384)}
    bank = {"emb": unit(24, 512), "ids": torch.arange(24), "near": torch.arange(8, 24).view(8, 2)}
    words = open_clip.get_tokenizer("ViT-B-32")
    clip = m.FrozenClip(open_clip.create_model("ViT-B-32"), None, words, "cpu")
    discriminator = m.Discriminator(512)
    ids = {"bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    blip = BlipForConditionalGeneration(BlipConfig(text_config=ids)).eval()
    tokenizer = m.word_tokenizer([" ".join(f"w{k}" for k in range(30520))], 512)
    # The family comes last: it may draw numbers of its own.
    return (family(blip, tokenizer, None), discriminator, clip, bank), [batch]


def timed(function, seconds):
    """The function, which then notes how long each call takes."""
    def call(*args, **options):
        start = time.perf_counter()
        result = function(*args, **options)
        seconds.append(time.perf_counter() - start)
        return result
    return call


def bench(family, case, new_tokens):
    """A step of a captioner's family. -> its loss; seconds of its parts, the whole step last."""
    torch.manual_seed(0)
    parts, (batch, *_) = case(family=family)
    captioner, seconds = parts[0], []
    captioner.max_new_tokens = new_tokens
    for name in ("encode", "generate", "log_prob"):
        setattr(captioner, name, timed(getattr(captioner, name), seconds))

    def step():
        loss, d_loss, _ = m.rl_step(batch, *parts)
        timed((loss + d_loss).backward, seconds)()
        return loss.item()

    step()  # warms up
    seconds.clear()
    return timed(step, seconds)(), seconds


PARTS = ("image encoder", "beams", "greedy", "log p of policy", "log p of GT", "backward")


def test_bench_the_released_way_gives_the_same_losses():
    """BENCH=1 takes BLIP-base on all cores. Random weights end no caption before the limit."""
    case, limits = frozen_case, [12]
    if os.environ.get("BENCH"):
        torch.set_num_threads(os.cpu_count())
        torch.set_flush_denormal(True)
        case, limits = base_case, [12, 50]
    for new_tokens in limits:
        loss, (*parts, ours) = bench(m.BlipCaptioner, case, new_tokens)
        released_loss, (*_, released) = bench(AsReleased, case, new_tokens)
        shares = [f"{name} {part / ours:.0%}" for name, part in zip(PARTS, parts, strict=True)]
        print(f"\n{new_tokens} new tokens: {ours:.2f} s a step, as released {released:.2f} s, "
              f"{released / ours:.2f} times as fast; losses {loss:.6f}, {released_loss:.6f}; "
              f"of our step: {', '.join(shares)}")
        assert released_loss == approx(loss, rel=1e-3)


# ==================================================================================================
# Copying: each piece runs by its source alone
# ==================================================================================================


def copied(*pieces, **more):
    """A namespace that holds the pieces' source and, of all else, only what is named here."""
    space = {"torch": torch, "nn": nn, "F": F, **more}
    for piece in pieces:
        exec(inspect.getsource(piece), space)
    return types.SimpleNamespace(**space)


def test_the_rewards_can_be_copied():
    mine = copied(m.contrast, m.bidirectional_reward)
    want = m.bidirectional_reward(**reward_case(), tau=.1)
    assert torch.equal(mine.bidirectional_reward(**reward_case(), tau=.1), want)


def test_the_discriminator_can_be_copied_and_learns():
    mine = copied(m.Discriminator, m.discriminator_loss, m.human_probability)
    discriminator, i = mine.Discriminator(16), unit(64, 16)
    for _ in range(60):
        loss, _ = mine.discriminator_loss(discriminator, i, i, -i)
        loss.backward()
        for weight in discriminator.parameters():
            weight.data -= weight.grad
            weight.grad = None
    p = mine.human_probability(discriminator, i, i)
    assert p.min() > .9


def test_retrieval_and_self_bleu_can_be_copied():
    mine = copied(m.retrieval, m.expected_recall, m.self_bleu, Counter=Counter, math=math)
    assert mine.retrieval(unit(9, 4), unit(9, 4))[0]["t2i_r1"] == 1
    # "a b" against itself: precisions 1, 1 and three times .1 by smoothing method 1
    assert mine.self_bleu(["a b", "a b"]) == approx(.1 ** .6)


def test_the_step_can_be_copied_into_a_loop_of_ones_own():
    rewards = {}
    mine = copied(m.contrast, m.bidirectional_reward, m.regularised_reward, m.advantages,
                  m.caption_log_prob, m.policy_gradient_loss, m.human_probability,
                  m.discriminator_loss, m.reward_pools, m.rl_step, m.wtf_step,
                  contextlib=contextlib, REWARDS=rewards)
    rewards["bidirectional"] = mine.bidirectional_reward
    check_ten_steps("full", mine.rl_step)
    check_ten_steps("WTF alone", mine.wtf_step)


# ==================================================================================================
# README
# ==================================================================================================


def test_the_readmes_short_snippets_run(toy, capsys):
    exec(readme_block("print(reward)"), {})
    assert re.search(r"tensor\(\[.*, .*\]\)", capsys.readouterr().out)
    exec(readme_block("human_probability"), {})
    assert re.search(r"one fault +called generated: \d", capsys.readouterr().out)
    exec(readme_block("mine.json"), {})
    assert len(m.load_data(["mine.json"])["train"]) == 1


def test_the_readmes_commands_parse():
    text = (PROGRAM.parent / "README.md").read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"distcap\.py ((?:train|eval|caption|compare) .*)", text)
    assert len(commands) > 6
    for line in commands:
        m.parse_flags(line.split())


def test_the_readmes_reward_for_trl():
    """Called as GRPOTrainer calls it, for texts and for chats that end with the caption."""
    space, t, images = {}, unit(6, 5), unit(3, 5, seed=1)
    exec(readme_block("make_reward"), space)
    clip = types.SimpleNamespace(
        encode_texts=lambda captions: t[[int(text) for text in captions]], tau=.1, device="cpu")
    reward = space["make_reward"](clip)
    completions = ["0", "1", "2", [{"content": "?"}, {"content": "3"}], [{"content": "4"}], "5"]
    own = [0, 0, 1, 1, 2]  # two captions of two images, one of a third; the last has no embedding
    column = [*(7 * images[own]).tolist(), None]
    got = reward(prompts=[], completions=completions, image_embedding=column, trainer_state=None)
    want = looped("bidirectional", .1, t[:5], images[own], t, t[:5], images,
                  torch.eye(5).bool(), torch.eye(3).bool()[own])
    assert got.pop() is None
    assert got == approx(want, abs=1e-5)
    one_image = reward(prompts=[], completions=["0", "1"], image_embedding=column[:2])
    assert one_image == [None, None]  # no negative


def chat_folder(folder):
    """SmolVLM in small: 32 x 32 pixels are 4 tokens, a letter is one. Random weights."""
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelling = Tokenizer(models.BPE(dict(zip(letters, range(256))), merges=[]))
    spelling.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelling.decoder = decoders.ByteLevel()
    special = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=spelling, pad_token="<|im_end|>", additional_special_tokens=special)
    template = (
        "{% for message in messages %}User:{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
        "{% endfor %}<end_of_utterance>\n{% endfor %}Assistant:")
    pixels = hf.Idefics3ImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    hf.Idefics3Processor(pixels, tokenizer, image_seq_len=4, chat_template=template
                         ).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2}
    config = hf.Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2,
        vision_config=size | {"image_size": 32, "patch_size": 8},
        text_config=size | {"model_type": "llama", "vocab_size": len(tokenizer),
                            "num_key_value_heads": 2, "initializer_range": .3})
    torch.manual_seed(0)
    hf.Idefics3ForConditionalGeneration(config).save_pretrained(folder)


def test_the_readmes_captioner_of_another_family(toy, monkeypatch):
    """A chat model, in two processes; what they save says the same when it is loaded."""
    chat_folder("chat")
    script = readme_block("AutoModelForImageTextToText")
    flags = "--captioner chat --clip runs/toy/clip --tf-steps 0 --steps 2 --alpha 1"
    run_two_processes(script, command("chat", *flags.split()))
    assert len(log_of(toy / "chat")) == 2
    monkeypatch.setattr(m, "CAPTIONERS", dict(m.CAPTIONERS))
    monkeypatch.setattr(m, "main", lambda: 0)
    with raises(SystemExit):
        exec(script, {"__name__": "chat"})
    captioner = m.load_captioner("runs/chat/captioner")
    items = m.load_data(["data/toy-0/captions_test.json"], ["data/toy-0/images"])["test"]
    pixels = [captioner.preprocess(m.open_image(item["file"])) for item in items[:4]]
    m.check_captioner(captioner, torch.stack(pixels))
    captions = m.generate_captions(captioner, items, "cpu", num_beams=2)
    assert captions == [entry["caption"] for entry in m.read_json("runs/chat/captions.json")]
