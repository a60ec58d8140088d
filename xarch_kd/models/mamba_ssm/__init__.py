"""Export to and import from the format of the mamba_ssm package."""
