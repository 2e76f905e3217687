# What the programs of a persona share.  The board's own facts are in /usr/lib/persona/board, its state is below
# /var/lib/persona, unless the real program keeps it in a place of its own.

. /usr/lib/persona/board
STATE=/var/lib/persona
UNITS=$STATE/units

is_root() {
	[ "$(id -u)" -eq 0 ]
}

# One program at a time changes the state.
lock_state() {
	mkdir -p "$STATE" && exec 9>"$STATE/lock" && flock 9
}

# --- units ----------------------------------------------------------------------------------------------------------
# A unit is a line "name preset" of $UNITS, or a file of the administrator's in /etc/systemd/system.  What is enabled or
# masked are links there, as with systemd itself; what is active are files below /run, which a boot forgets.

ADMINISTRATOR=/etc/systemd/system
ACTIVE=/run/persona/active

# unit_name WORD: with its suffix, and by its own name where systemd knows an alias.
unit_name() {
	case $1 in
	chronyd | chronyd.service) echo chrony.service ;;
	sshd | sshd.service) echo ssh.service ;;
	*.service | *.swap | *.timer | *.target | *.socket | *.mount) echo "$1" ;;
	*) echo "$1.service" ;;
	esac
}

# file_state UNIT: enabled, disabled, static, generated or masked; nothing when there is no such unit.
file_state() {
	preset=$(awk -v unit="$1" '$1 == unit { print $2 }' "$UNITS")
	if [ "$(readlink "$ADMINISTRATOR/$1")" = /dev/null ]; then
		echo masked
	elif [ "$preset" = static ] || [ "$preset" = generated ]; then
		echo "$preset"
	elif [ -n "$preset" ] || [ -f "$ADMINISTRATOR/$1" ]; then
		for link in "$ADMINISTRATOR"/*.wants/"$1"; do
			[ -L "$link" ] && echo enabled && return
		done
		echo disabled
	fi
}

is_running() {
	[ -e "$ACTIVE/$1" ]
}

# wants UNIT: the link by which it is enabled.
wants() {
	target=multi-user.target
	case $1 in *.timer) target=timers.target ;; esac
	[ -f "$ADMINISTRATOR/$1" ] && target=$(sed -n 's/^WantedBy=//p' "$ADMINISTRATOR/$1")
	echo "$ADMINISTRATOR/${target:-multi-user.target}.wants/$1"
}

# effect UNIT start|stop: what the unit does to the machine, where this persona shows it.
effect() {
	if [ -x "/usr/lib/persona/effects/$1" ]; then
		"/usr/lib/persona/effects/$1" "$2" 9>&-
	fi
}

start_unit() {
	is_running "$1" && return
	if [ -f "$ADMINISTRATOR/$1" ]; then
		start_own_unit "$ADMINISTRATOR/$1"
	else
		mkdir -p "$ACTIVE" && touch "$ACTIVE/$1"
		effect "$1" start
	fi
}

# start_own_unit FILE: run what a unit of the administrator's says; those that do one thing and end.
start_own_unit() {
	if ! grep -q '^Type=oneshot' "$1"; then
		echo "Failed to start ${1##*/}: on this virtual board, units of Type=oneshot can be started." >&2
		return 1
	fi
	if ! (eval "$(sed -n 's/^ExecStart=//p' "$1")") 9>&- </dev/null; then
		echo "Job for ${1##*/} failed because the control process exited with error code." >&2
		return 1
	fi
	if grep -q '^RemainAfterExit=\(yes\|true\|1\)' "$1"; then
		mkdir -p "$ACTIVE" && touch "$ACTIVE/${1##*/}"
	fi
}

stop_unit() {
	is_running "$1" || return 0
	rm "$ACTIVE/$1"
	effect "$1" stop
}

# first_boot: what the system image has enabled.
first_boot() {
	[ -e "$UNITS" ] && return
	mkdir -p "$STATE" && sed '/^#/d; /^$/d' /usr/lib/persona/units >"$UNITS"
	for unit in $(awk '$2 == "enabled" { print $1 }' "$UNITS"); do
		link=$(wants "$unit")
		mkdir -p "${link%/*}" && ln -sf "/lib/systemd/system/$unit" "$link"
	done
}

# boot_units: what is enabled, generated or always part of the boot, then the administrator's own.
boot_units() {
	rm -rf "$ACTIVE"
	show_systemd
	for unit in $(awk '{ print $1 }' "$UNITS"); do
		case $(file_state "$unit") in
		enabled | generated) start_unit "$unit" ;;
		static) case " $STATIC_AT_BOOT " in *" $unit "*) start_unit "$unit" ;; esac ;;
		esac
	done
	for file in "$ADMINISTRATOR"/*.service; do
		[ -f "$file" ] && [ "$(file_state "${file##*/}")" = enabled ] && start_unit "${file##*/}"
	done
	return 0
}

# show_systemd: the place by which programs see that systemd is process 1.  Not where memory is capped by cgroup v2:
# there, a user without rights needs a service manager of his own, and no persona has one.
show_systemd() {
	if grep -q ':memory:' /proc/self/cgroup; then
		mkdir -p /run/systemd/system
	fi
}

# --- swap: /proc/swaps is an ordinary file here, changed in place because it is bind-mounted -------------------------

empty_swaps() {
	printf 'Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n' >/proc/swaps
	count_swap
}

# add_swap NAME TYPE KIB PRIORITY
add_swap() {
	printf '%-40s%s\t%s%s\t\t0\t\t%s\n' "$1" "$2" "$([ "$2" = file ] && printf '\t')" "$3" "$4" >>/proc/swaps
	count_swap
}

# remove_swaps PATTERN: the lines whose device matches (an extended regular expression).
remove_swaps() {
	kept=$(awk -v pattern="$1" 'NR == 1 || $1 !~ pattern' /proc/swaps)
	printf '%s\n' "$kept" >/proc/swaps
	count_swap
}

# count_swap: the sum, in /proc/meminfo, where that is a file of the host's own; its length must stay.
count_swap() {
	counted=$(awk 'NR == FNR { if (FNR > 1) total += $3; next }
		/^Swap(Total|Free):/ { printf "%-16s%8d kB\n", $1, total; next }
		{ print }' /proc/swaps /proc/meminfo)
	{ printf '%s\n' "$counted" 1<>/proc/meminfo; } 2>/dev/null || true
}

# --- processors -----------------------------------------------------------------------------------------------------

CPUS=/sys/devices/system/cpu

# Frequencies and governors are not kept over a reboot.
reset_cpufreq() {
	for policy in "$CPUS"/cpufreq/policy*; do
		[ -d "$policy" ] || continue
		cat "$policy/cpuinfo_min_freq" >"$policy/scaling_min_freq"
		cat "$policy/cpuinfo_max_freq" >"$policy/scaling_max_freq"
		echo "$GOVERNOR" >"$policy/scaling_governor"
	done
	for online in "$CPUS"/cpu[0-9]*/online; do
		[ -e "$online" ] && echo 1 >"$online"
	done
	list_online_cpus
}

# /sys/devices/system/cpu/online, from every cpu's own file: "0-3" or "0-1,3".
list_online_cpus() {
	for cpu in "$CPUS"/cpu[0-9]*; do
		[ ! -e "$cpu/online" ] || [ "$(cat "$cpu/online")" = 1 ] && echo "${cpu##*/cpu}"
	done | sort -n | awk '
		NR > 1 && $1 != last + 1 { print_range() }
		NR == 1 || $1 != last + 1 { first = $1 }
		{ last = $1 }
		function print_range() { text = text (text == "" ? "" : ",") (first == last ? first : first "-" last) }
		END { print_range(); print text }' >"$CPUS/online"
}

# --- other things of a boot -------------------------------------------------------------------------------------------

# The groups that the board's system image has and the host may lack.
add_groups() {
	for group in $DEVICE_GROUPS; do
		getent group "$group" >/dev/null || groupadd --system "$group"
	done
}
