"""The ERNIE-4.5-VL model: single-device maths and checkpoint formats."""
