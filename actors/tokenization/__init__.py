"""The tokenizer of a model directory, whichever files hold it, as one tokenizer.json for everything that needs one."""
