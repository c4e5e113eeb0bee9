"""Tests of this extension; they use the fixtures and helpers of the core's."""
