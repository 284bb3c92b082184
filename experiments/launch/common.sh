# What the launch scripts share. They run with the bash of macOS (3.2), too.

fail() { # one line on standard error and status 2, as the Python commands end on bad input
  printf 'error: %s\n' "$*" >&2
  exit 2
}

show_help() { # the comment at the head of a script is its help
  sed -n '2,/^$/s/^# \{0,1\}//p' "$1"
}

value() { # value "$@" inside a loop over settings: what follows the setting
  [ $# -ge 2 ] || fail "$1 needs a value; --help tells which"
  printf '%s\n' "$2"
}

needed() { # needed VALUE WHAT
  [ -n "$1" ] || fail "$2"
}

whole_number() { # whole_number VALUE SETTING
  case $1 in
    "" | 0 | *[!0-9]*) fail "$2 is '$1': expected a whole number of at least 1" ;;
  esac
}

quoted() { # the words as one line that a shell reads back as the same words
  local word line=""
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

dry_run=false
run() { # runs a command, or shows it
  if $dry_run; then quoted "$@"; else "$@"; fi
}

check_training() { # check_training ARGUMENTS-OF-EXPERIMENTS.RUN
  local argument out=false
  [ $# -gt 0 ] || fail "nothing to train: behind -- experiments.run's arguments, digits_noise --method jtds --out out/a"
  for argument in "$@"; do
    case $argument in
      --out | --out=*) out=true ;;
      --distributed | --distributed=*) fail "leave --distributed out: this script finds it" ;;
    esac
  done
  $out || fail "no --out among the arguments of experiments.run: give a folder that all processes share"
}

environment=(env)
add_environment() { # add_environment NAME=VALUE
  case $1 in
    [A-Za-z_]*=*) environment+=("$1") ;;
    *) fail "--env is '$1': expected NAME=VALUE" ;;
  esac
}

# The three commands below are read by a shell on another machine. A run is detached from the ssh connection (nohup, no
# terminal), so that it goes on when the connection is lost. Its log lies under the host's name: the repository may be
# on a disk that the hosts share. A process number may belong to another program after a restart, hence the look at its
# name (ps -ww: whole, however long).

in_repository() { # in_repository FOLDER
  cat <<END
cd $(quoted "$1") || exit 1
logs=out/launch/\$(hostname)
running() { [ -s "\$logs/pid" ] && ps -ww -p "\$(cat "\$logs/pid")" -o args= | grep -q experiments.run; }
END
}

remote_start() { # remote_start FOLDER COMMAND...
  in_repository "$1"
  shift
  cat <<END
if running; then echo "\$(hostname): a run is going on, process \$(cat "\$logs/pid"): stop it first" >&2; exit 1; fi
mkdir -p "\$logs" || exit 1
nohup $(quoted "$@") >>"\$logs/log" 2>&1 </dev/null &
echo \$! >"\$logs/pid"
echo "\$(hostname): started process \$(cat "\$logs/pid"), log in \$(pwd)/\$logs/log"
END
}

remote_log() { # remote_log FOLDER
  in_repository "$1"
  cat <<END
if running; then echo "== \$(hostname): running"; else echo "== \$(hostname): ended"; fi
tail -n 20 "\$logs/log"
END
}

remote_stop() { # remote_stop FOLDER
  in_repository "$1"
  cat <<END
if ! running; then echo "\$(hostname): nothing is running"; exit; fi
kill -TERM "\$(cat "\$logs/pid")" && echo "\$(hostname): saves and stops"
END
}
