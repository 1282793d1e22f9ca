# shellcheck shell=bash
# Sourced by build_emoji.sh and build_scenes.sh: makes the Python environment in the folder named first, unless it is
# complete, and leaves its interpreter in $python. The renderers' versions are pinned, because the pixels depend on them.
for tool in npm python3; do
    command -v "$tool" >/dev/null || { printf 'error: %s is missing\nhint: ./scripts/setup.sh data\n' "$tool" >&2; exit 1; }
done
python=$1/bin/python
"$python" -c 'import PIL, resvg_py, opencc' 2>/dev/null || {
    [ -x "$1/bin/pip" ] || python3 -m venv --clear "$1"
    "$1/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 resvg_py==0.5.0 opencc==1.4.2
}
