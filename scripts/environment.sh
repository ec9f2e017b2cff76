# Sourced by the other scripts: makes .venv where there is none, installs the project into it, and activates it.
#   install_project [EXTRA]
install_project() {
  local target=".${1:+[$1]}" wanted stamp
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  stamp=".venv/installed-${1:-plain}"
  wanted=$(cat pyproject.toml constraints.txt | cksum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into .venv (a few minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable "$target"
    echo "$wanted" > "$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}
