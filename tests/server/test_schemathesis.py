"""Requests made up from the OpenAPI document, good ones and bad ones: no 5xx, no hang, and what the document says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.openapi.checks import (
    UndefinedContentType,
)

from kvwise.models.loaded import LoadedModel
from tests.server.conftest import Served, key_file, make_server, serving
