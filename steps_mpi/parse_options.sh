# shellcheck shell=bash
# Options of the form "--name value" for shell scripts; to be sourced after the variables' defaults:
#
#   num_epochs=4   # default
#   . parse_options.sh
#
# turns "--num-epochs 8" into num_epochs=8. It behaves as utils/parse_options.sh of Kaldi does:
#  * the variable must have a default (it may be empty); an option without one is an error;
#  * a variable whose default is true or false takes only those;
#  * "--config FILE" sources FILE first, so that the command line has the last word;
#  * "--help" prints $help_message and ends the script with status 0;
#  * parsing stops at the first argument that is no option; "$@" keeps the rest;
#  * "--name=value" is refused, and so is an empty --cmd.

_parse_options_fail() {
  echo "$0: $1" >&2
  exit 1
}

for ((_i = 1; _i < $#; _i++)); do
  if [ "${!_i}" == "--config" ]; then
    _next=$((_i + 1))
    [ -r "${!_next}" ] || _parse_options_fail "cannot read the configuration file '${!_next}'"
    # Without a slash, "." would look along PATH.
    # shellcheck source=/dev/null
    case "${!_next}" in
      */*) . "${!_next}" ;;
      *) . "./${!_next}" ;;
    esac
    # shellcheck disable=SC2034 # the option's variable, as every option has one
    config=${!_next}
  fi
done

while [ $# -gt 0 ] && [ -n "$1" ]; do
  case "$1" in
    --help | -h)
      if [ -n "${help_message:-}" ]; then
        printf '%b\n' "$help_message" >&2
      else
        echo "No help found." >&2
      fi
      exit 0
      ;;
    --*=*)
      _parse_options_fail "options have the form --name value, got '$1'"
      ;;
    --*)
      _name=${1#--}
      _name=${_name//-/_}
      [[ "$_name" =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || _parse_options_fail "invalid option $1"
      [ -n "${!_name+set}" ] || _parse_options_fail "invalid option $1"
      [ $# -ge 2 ] || _parse_options_fail "option $1 needs a value"
      if [ "${!_name}" == true ] || [ "${!_name}" == false ]; then
        [ "$2" == true ] || [ "$2" == false ] || _parse_options_fail "expected true or false: $1 $2"
      fi
      printf -v "$_name" '%s' "$2"
      shift 2
      ;;
    *)
      break
      ;;
  esac
done

if [ -n "${cmd+set}" ] && [ -z "$cmd" ]; then
  _parse_options_fail "empty argument to the --cmd option"
fi
unset _i _next _name
true # the status of sourcing this file
