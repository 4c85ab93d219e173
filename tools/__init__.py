"""Set-up of the development environment: virtual environment, pinned packages and a ComfyUI.

Standard library only: these modules run before anything is installed.
"""
