"""Vectors on a hub: the real client against a stand-in of its endpoints on this machine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from helpers.hub import SHA, Hub
from helpers.synthetic_run import *  # noqa: F403
